//! How fast volumes heal, and how long what is left will take.
//!
//! A pace is what was healed over the last while. What a guest's failing writes add meanwhile is not subtracted: it is part of
//! what is left. So a volume that loses more than it heals has an end that moves away, which is the truth.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::admin::VolumeStatus;

/// Over how long a pace is taken.
const WINDOW: Duration = Duration::from_secs(30);
/// Between two looks while something heals.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks while nothing does: an idle node is to sleep.
const LOOK_IDLE: Duration = Duration::from_secs(5);

/// When it was looked, and regions that were left then.
type Looks = VecDeque<(Instant, u64)>;

/// See the module.
#[derive(Default)]
pub(crate) struct Paces {
    volumes: BTreeMap<String, Looks>,
    next: Option<Instant>,
}

impl Paces {
    /// Whether it is time for [`Paces::look`].
    pub(crate) fn due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// Takes in how much is left.
    pub(crate) fn look(&mut self, now: Instant, volumes: &[VolumeStatus]) {
        let left = |name: &str| {
            let mut volumes = volumes.iter();
            let found = volumes.find(|volume| volume.name == name && volume.regions_to_heal > 0);
            found.map(|volume| volume.regions_to_heal)
        };
        self.volumes.retain(|name, _| left(name).is_some());
        for volume in volumes.iter().filter(|volume| volume.regions_to_heal > 0) {
            let looks = self.volumes.entry(volume.name.clone()).or_default();
            looks.push_back((now, volume.regions_to_heal));
            // One that is older stays: the window is never shorter than it could be.
            while looks
                .get(1)
                .is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW)
            {
                looks.pop_front();
            }
        }
        let pause = if self.volumes.is_empty() { LOOK_IDLE } else { LOOK };
        self.next = Some(now + pause);
    }

    /// Says of each volume when it will be whole.
    pub(crate) fn tell(&self, volumes: &mut [VolumeStatus]) {
        for volume in volumes {
            let looks = self.volumes.get(&volume.name);
            volume.heal_seconds = looks.and_then(|looks| seconds(looks, volume.regions_to_heal));
        }
    }
}

/// How long `left` regions take at the pace of these looks; `None` if nothing was healed in them.
fn seconds(looks: &Looks, left: u64) -> Option<u64> {
    let (first, last) = (looks.front()?.0, looks.back()?.0);
    let pairs = looks.iter().zip(looks.iter().skip(1));
    let healed: u64 = pairs
        .map(|(before, after)| before.1.saturating_sub(after.1))
        .sum();
    let elapsed = last.duration_since(first).as_secs_f64();
    (healed > 0 && left > 0).then(|| (elapsed * left as f64 / healed as f64).ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(regions_to_heal: u64) -> VolumeStatus {
        VolumeStatus {
            name: "v".into(),
            regions_to_heal,
            ..VolumeStatus::default()
        }
    }

    /// What is said after looks a second apart.
    fn said(paces: &mut Paces, begun: Instant, looks: &[u64]) -> Option<u64> {
        let mut last = volume(0);
        for (second, &left) in looks.iter().enumerate() {
            last = volume(left);
            paces.look(begun + Duration::from_secs(second as u64), &[last.clone()]);
        }
        paces.tell(std::slice::from_mut(&mut last));
        last.heal_seconds
    }

    #[test]
    fn the_end_of_healing_is_told_from_its_pace() {
        let begun = Instant::now();
        let told = |looks: &[u64]| said(&mut Paces::default(), begun, looks);
        assert_eq!(told(&[100]), None, "there is no pace yet");
        assert_eq!(told(&[100, 90]), Some(9));
        assert_eq!(
            told(&[100, 90, 90, 80]),
            Some(12),
            "a second without any is no end"
        );
        assert_eq!(told(&[100, 100]), None);
        assert_eq!(told(&[100, 120]), None);
        assert_eq!(told(&[100, 90, 120, 110]), Some(17), "20 in 3 s, 110 left");
        assert_eq!(told(&[100, 0]), None, "it is whole");
        assert_eq!(
            told(&[100, 0, 50]),
            None,
            "what was before does not count for what comes now"
        );
        let mut slow: Vec<u64> = (0..40).map(|second| 1_000 - 10 * second).collect();
        slow.extend((0..40).map(|second| 600 - second));
        assert_eq!(told(&slow), Some(561), "one a second by now");
    }

    #[test]
    fn a_node_with_nothing_to_heal_is_looked_at_seldom() {
        let (mut paces, now) = (Paces::default(), Instant::now());
        assert!(paces.due(now));
        paces.look(now, &[volume(0)]);
        assert!(!paces.due(now + LOOK) && paces.due(now + LOOK_IDLE));
        paces.look(now, &[volume(1)]);
        assert!(paces.due(now + LOOK));
    }
}
