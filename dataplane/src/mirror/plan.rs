//! What an extent becomes, given what every replica has of it. Pure.
//!
//! The in-sync replica with the highest version wins; a replica that is being rebuilt is never a winner. Where the
//! winner's data of a block is bad it comes from whoever has data that matches, in this order: the winner's own record,
//! the newest other in-sync record, and, only if the caller allows adoption, whatever the device returned. A block for
//! which there is nothing is recorded lost, or left as it is where nobody depends on it.
//!
//! Two records without data and without lost blocks are equal whatever their versions: a store forgets the record of an
//! empty extent at a time of its own choosing.

use crate::ids::{BLOCKS_PER_EXTENT, BlockMask};
use crate::planted::{self, Bug};
use crate::replica::{ExtentDigest, ExtentImage};

/// Most replicas that take part.
pub(super) const VIEWS_MAX: usize = crate::config::SLOTS_MAX;

/// What one replica has.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub(super) digest: &'a ExtentDigest,
    pub(super) in_sync: bool,
    pub(super) suspect: bool,
}

/// Where a block's data comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Source {
    /// It has none, or nobody has it.
    #[default]
    None,
    /// The replica's block is good.
    Good(u8),
    /// The device's content, whatever the replica's record says.
    Raw(u8),
}

/// What to do about an extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// What it becomes. Takes a new version if `changed`.
    pub(super) image: ExtentImage,
    /// The content is no replica's record as it was: it needs a version of its own.
    pub(super) changed: bool,
    /// Per block.
    pub(super) source: [Source; BLOCKS_PER_EXTENT],
    /// Blocks adopted from a device against every record.
    pub(super) adopted: BlockMask,
    /// Blocks newly recorded lost.
    pub(super) lost: BlockMask,
    /// Per replica: the blocks to send, if it has to change.
    pub(super) install: [Option<BlockMask>; VIEWS_MAX],
    /// Replicas whose record is right already: only bad data is written anew.
    pub(super) mends: u8,
}

fn empty(image: &ExtentImage) -> bool {
    image.valid == 0 && image.lost == 0
}

fn same(a: &ExtentImage, b: &ExtentImage) -> bool {
    empty(a) && empty(b)
        || a.version == b.version
            && a.valid == b.valid
            && a.zero == b.zero
            && a.lost == b.lost
            && (0..BLOCKS_PER_EXTENT).all(|i| a.valid >> i & 1 == 0 || a.crcs[i] == b.crcs[i])
}

fn good(digest: &ExtentDigest, b: usize) -> bool {
    digest.image.valid >> b & 1 != 0 && digest.bad >> b & 1 == 0
}

fn found(digest: &ExtentDigest, b: usize) -> Option<u32> {
    (digest.bad >> b & 1 != 0 && digest.unreadable >> b & 1 == 0).then_some(digest.found[b])
}

/// Plans an extent. `adopt`: all replicas rebooted and have the region in doubt. None: no in-sync replica.
pub(super) fn plan(views: &[View<'_>], adopt: bool) -> Option<Plan> {
    let first = plan_as(views, adopt, false)?;
    let unsure =
        (0..BLOCKS_PER_EXTENT).any(|b| first.image.valid >> b & 1 != 0 && first.source[b] == Source::None);
    if unsure && first.install.iter().any(Option::is_some) {
        return plan_as(views, adopt, true);
    }
    Some(first)
}

fn plan_as(views: &[View<'_>], adopt: bool, record_lost: bool) -> Option<Plan> {
    // In-sync replicas, undamaged first, then newest first.
    let mut order = [0u8; VIEWS_MAX];
    let mut n = 0;
    for (i, view) in views.iter().enumerate() {
        if view.in_sync {
            order[n] = i as u8;
            n += 1;
        }
    }
    let order = &mut order[..n];
    order.sort_by_key(|&i| {
        let view = &views[usize::from(i)];
        (view.suspect, !view.digest.image.version.0, i)
    });
    let winner = usize::from(*order.first()?);
    let base = views[winner].digest;
    let mut plan = Plan {
        image: base.image,
        ..Plan::default()
    };
    for b in 0..BLOCKS_PER_EXTENT {
        let bit: BlockMask = 1 << b;
        let unknown = base.bad & bit != 0 && base.image.valid & bit == 0 && base.image.lost & bit == 0;
        if base.image.valid & bit == 0 && !unknown {
            continue;
        }
        let wanted = (!unknown).then_some(base.image.crcs[b]);
        let (source, crc) = match choose(views, order, b, wanted, adopt) {
            Some(Choice::Data(source, crc)) => (source, crc),
            Some(Choice::Hole) => {
                plan.image.valid &= !bit;
                plan.image.zero |= bit;
                plan.image.lost &= !bit;
                plan.image.crcs[b] = 0;
                plan.changed = true;
                continue;
            }
            None if record_lost => {
                plan.image.valid &= !bit;
                plan.image.zero &= !bit;
                plan.image.lost |= bit;
                plan.image.crcs[b] = 0;
                plan.lost |= bit;
                plan.changed = true;
                continue;
            }
            None => continue,
        };
        plan.source[b] = source;
        if wanted != Some(crc) {
            plan.changed = true;
            plan.image.valid |= bit;
            plan.image.zero &= !bit;
            plan.image.crcs[b] = crc;
            let recorded = order.iter().any(|&i| {
                let image = &views[usize::from(i)].digest.image;
                image.valid & bit != 0 && image.crcs[b] == crc
            });
            plan.adopted |= if recorded { 0 } else { bit };
        }
    }
    for (i, view) in views.iter().enumerate() {
        let there = &view.digest.image;
        let mut write = 0;
        for b in 0..BLOCKS_PER_EXTENT {
            let has = good(view.digest, b) && there.crcs[b] == plan.image.crcs[b];
            if plan.image.valid >> b & 1 != 0 && plan.source[b] != Source::None && !has {
                write |= 1 << b;
            }
        }
        // A hole that a suspect disk is not sure of is no reason: no install makes it surer, the settling of its region does.
        let forgotten = planted::on(Bug::RebuildForgetsTrims) && !view.in_sync && empty(&plan.image);
        if (plan.changed || !same(there, &plan.image) || write != 0) && !forgotten {
            plan.install[i] = Some(write);
            plan.mends |= u8::from(!plan.changed && same(there, &plan.image)) << i;
        }
    }
    Some(plan)
}

/// What a block becomes.
enum Choice {
    /// Data from there, with this checksum.
    Data(Source, u32),
    /// Nothing was ever written there that anybody was promised.
    Hole,
}

/// Where block `b` comes from, and its checksum.
fn choose(views: &[View<'_>], order: &[u8], b: usize, wanted: Option<u32>, adopt: bool) -> Option<Choice> {
    let in_sync = || order.iter().map(|&i| (i, views[usize::from(i)].digest));
    let others = || {
        views
            .iter()
            .enumerate()
            .filter(|(_, view)| !view.in_sync)
            .map(|(i, view)| (i as u8, view.digest))
    };
    if let Some(crc) = wanted {
        for (i, digest) in in_sync().chain(others()) {
            if good(digest, b) && digest.image.crcs[b] == crc {
                return Some(Choice::Data(Source::Good(i), crc));
            }
        }
        for (i, digest) in in_sync().chain(others()) {
            if found(digest, b) == Some(crc) {
                return Some(Choice::Data(Source::Raw(i), crc));
            }
        }
    }
    // An older state that is intact: the write that hit the block was acknowledged to nobody, else this replica had it.
    for (i, digest) in in_sync() {
        if good(digest, b) {
            return Some(Choice::Data(Source::Good(i), digest.image.crcs[b]));
        }
        let bit: BlockMask = 1 << b;
        let image = &digest.image;
        if !views[usize::from(i)].suspect && (image.valid | image.lost | digest.bad) & bit == 0 {
            return Some(Choice::Hole);
        }
    }
    for (_, record) in in_sync().filter(|(_, digest)| digest.image.valid >> b & 1 != 0) {
        for (i, digest) in in_sync() {
            if found(digest, b) == Some(record.image.crcs[b]) {
                return Some(Choice::Data(Source::Raw(i), record.image.crcs[b]));
            }
        }
    }
    if adopt && wanted.is_some() {
        for (i, digest) in in_sync() {
            if let Some(crc) = found(digest, b) {
                return Some(Choice::Data(Source::Raw(i), crc));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Version;

    fn digest(version: u64, blocks: &[(usize, u32)]) -> ExtentDigest {
        let mut digest = ExtentDigest::default();
        digest.image.version = Version(version);
        for &(b, crc) in blocks {
            digest.image.valid |= 1 << b;
            digest.image.crcs[b] = crc;
        }
        digest
    }

    fn bad(mut digest: ExtentDigest, b: usize, found: Option<u32>) -> ExtentDigest {
        digest.bad |= 1 << b;
        match found {
            Some(crc) => digest.found[b] = crc,
            None => digest.unreadable |= 1 << b,
        }
        digest
    }

    fn plan_of(replicas: &[(&ExtentDigest, bool)], adopt: bool) -> Plan {
        let views: Vec<_> = replicas
            .iter()
            .map(|&(digest, in_sync)| View {
                digest,
                in_sync,
                suspect: false,
            })
            .collect();
        plan(&views, adopt).unwrap()
    }

    #[test]
    fn the_highest_version_wins_and_only_what_differs_is_sent() {
        let (a, b) = (digest(7, &[(0, 1), (1, 2)]), digest(9, &[(0, 1), (1, 3)]));
        let plan = plan_of(&[(&a, true), (&b, true)], false);
        assert_eq!((plan.image, plan.changed), (b.image, false));
        assert_eq!((plan.install[0], plan.install[1], plan.mends), (Some(2), None, 0));
        assert_eq!(plan.source[1], Source::Good(1));
    }

    #[test]
    fn a_rebuilding_replica_loses_whatever_its_version() {
        let (source, target) = (digest(0, &[]), digest(9, &[(3, 1)]));
        let plan = plan_of(&[(&source, true), (&target, false)], false);
        assert_eq!(plan.install[..2], [None, Some(0)]);
        assert_eq!(plan.image.version, Version::ZERO);
    }

    #[test]
    fn a_bad_block_comes_from_a_good_copy() {
        let a = bad(digest(9, &[(0, 1)]), 0, Some(77));
        let b = digest(9, &[(0, 1)]);
        let plan = plan_of(&[(&a, true), (&b, true)], true);
        assert_eq!((plan.source[0], plan.changed), (Source::Good(1), false));
        assert_eq!((plan.install[0], plan.install[1], plan.mends), (Some(1), None, 1));
    }

    #[test]
    fn data_that_matches_an_older_record_beats_adoption() {
        let a = bad(digest(9, &[(0, 5)]), 0, Some(4));
        let b = bad(digest(8, &[(0, 4)]), 0, Some(99));
        let plan = plan_of(&[(&a, true), (&b, true)], true);
        assert_eq!((plan.source[0], plan.image.crcs[0]), (Source::Raw(0), 4));
        assert!(plan.changed && plan.adopted == 0);
    }

    #[test]
    fn a_torn_first_write_becomes_a_hole_again_where_an_intact_replica_never_had_it() {
        let torn = bad(digest(9, &[(0, 5), (1, 6)]), 0, Some(77));
        let before = digest(8, &[(1, 6)]);
        for adopt in [false, true] {
            let plan = plan_of(&[(&torn, true), (&before, true)], adopt);
            assert_eq!(
                (plan.image.valid, plan.image.zero, plan.lost, plan.adopted),
                (2, 1, 0, 0)
            );
            assert!(plan.changed && plan.install[..2].iter().all(Option::is_some));
        }
        let mut lost = digest(8, &[(1, 6)]);
        lost.image.lost = 1;
        let plan = plan_of(&[(&torn, true), (&lost, true)], false);
        assert_eq!(
            plan.image.valid & 1 & !plan.image.lost,
            plan.image.valid & 1,
            "a lost block is no hole"
        );
        assert_eq!(plan.image.zero & 1, 0);
    }

    #[test]
    fn adoption_only_where_allowed_and_never_of_the_unreadable() {
        let a = bad(digest(9, &[(0, 5)]), 0, None);
        let b = bad(digest(9, &[(0, 5)]), 0, Some(6));
        let plan = plan_of(&[(&a, true), (&b, true)], true);
        assert_eq!((plan.source[0], plan.adopted), (Source::Raw(1), 1));
        assert_eq!(plan.install[..2], [Some(1), Some(1)]);
        let plan = plan_of(&[(&a, true), (&b, true)], false);
        assert_eq!(
            (plan.lost, plan.install[0]),
            (0, None),
            "nobody depends on it: it stays as it is"
        );
        let target = digest(0, &[]);
        let plan = plan_of(&[(&a, true), (&b, true), (&target, false)], false);
        assert_eq!((plan.image.lost, plan.image.valid), (1, 0));
        assert_eq!(plan.install[..3], [Some(0), Some(0), Some(0)]);
    }
}
