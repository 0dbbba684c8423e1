//! Which free slots may hold bytes after a crash: only those of the announced windows.
//!
//! Data and record of a new extent are written side by side. After a crash the data may be there and the record not: the
//! slot looks free and is not zero, and its next owner could adopt the bytes. So slots are taken only from a few windows
//! (runs of slots) whose announcement in the journal is durable, and opening zeroes every free slot of the windows that
//! were announced. A checkpoint header lists the windows as they were at its tail; later ones are found by replay.
//!
//! A window may be replaced while an operation that took a slot of it still waits to begin. Such a slot was not written;
//! it is given back and another is taken. Thus at the moment its record is journaled, a slot's window always counts.

use super::codec::{ENTRY_MAX, Entry, NO_WINDOW, WINDOWS};
use super::slots::WINDOW;
use super::{Effect, Store};

/// Free slots left in all windows together below which another one is announced ahead.
const LOW: u32 = WINDOW / 4;

/// The announced windows.
#[derive(Debug)]
pub(super) struct Windows {
    pub(super) all: [u32; WINDOWS],
    /// The journal must be durable up to here for a window to count.
    need: [u64; WINDOWS],
    /// The one that is taken from.
    present: usize,
    /// The one that is replaced next.
    oldest: usize,
    /// Where a window with free slots is looked for.
    hand: u32,
}

/// What came of the wish for a slot.
pub(super) enum Taken {
    Slot(u32),
    /// The disk is full.
    Full,
    /// A window was announced: wait until the journal is durable up to here.
    Wait(u64),
    /// The journal has no room.
    NoRoom,
}

impl Windows {
    pub(super) fn new() -> Self {
        Windows {
            all: [NO_WINDOW; WINDOWS],
            need: [0; WINDOWS],
            present: 0,
            oldest: 0,
            hand: 0,
        }
    }

    /// The slot's window is announced, in what is durable of the journal. A window may be replaced and announced anew
    /// while an operation holds a slot of it: a checkpoint between the two knows nothing of it.
    pub(super) fn counts(&self, slot: u32, durable: u64) -> bool {
        let window = slot / WINDOW;
        (0..WINDOWS).any(|n| self.all[n] == window && self.need[n] <= durable)
    }
}

impl Store {
    /// Takes a slot from a window.
    #[inline]
    pub(super) fn take_slot(&mut self, out: &mut Vec<Effect>) -> Taken {
        if self.slots.free() == 0 {
            return Taken::Full;
        }
        for step in 0..WINDOWS {
            let n = (self.windows.present + step) % WINDOWS;
            let window = self.windows.all[n];
            if window == NO_WINDOW || self.windows.need[n] > self.journal.durable {
                continue;
            }
            if let Some(slot) = self.slots.take_in(window) {
                if n != self.windows.present || slot % (LOW / 2) == 0 {
                    self.windows.present = n;
                    self.announce_ahead(out);
                }
                return Taken::Slot(slot);
            }
        }
        for n in 0..WINDOWS {
            let window = self.windows.all[n];
            if window != NO_WINDOW && self.slots.free_in(window) > 0 {
                return Taken::Wait(self.windows.need[n]);
            }
        }
        match self.announce(out) {
            Some(need) => Taken::Wait(need),
            None => Taken::NoRoom,
        }
    }

    fn announce_ahead(&mut self, out: &mut Vec<Effect>) {
        let left: u32 = self
            .windows
            .all
            .iter()
            .filter(|&&w| w != NO_WINDOW)
            .map(|&w| self.slots.free_in(w))
            .sum();
        if left < LOW && u64::from(left) < self.slots.free() {
            self.announce(out);
        }
    }

    /// Announces the next window that has free slots and is none yet, in place of the oldest.
    fn announce(&mut self, out: &mut Vec<Effect>) -> Option<u64> {
        if !self.make_room(ENTRY_MAX, out) {
            return None;
        }
        let count = self.slots.windows();
        for _ in 0..count {
            let window = self.windows.hand;
            self.windows.hand = (window + 1) % count;
            if !self.windows.all.contains(&window) && self.slots.free_in(window) > 0 {
                let index = self.windows.oldest;
                self.windows.oldest = (index + 1) % WINDOWS;
                let entry = Entry::Window {
                    index: index as u32,
                    window,
                };
                let need = self.journal.append(&mut self.arena, &entry);
                self.windows.all[index] = window;
                self.windows.need[index] = need;
                return Some(need);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A slot taken before its window was replaced and announced again must wait for the second announcement too.
    #[test]
    fn a_window_counts_once_its_announcement_is_durable() {
        let mut windows = Windows::new();
        assert!(!windows.counts(0, u64::MAX));
        (windows.all[2], windows.need[2]) = (3, 7);
        let slot = 3 * WINDOW + 5;
        assert!(!windows.counts(slot, 6) && windows.counts(slot, 7));
        assert!(!windows.counts(slot + WINDOW, 7));
        (windows.all[2], windows.all[0], windows.need[0]) = (9, 3, 20);
        assert!(!windows.counts(slot, 19) && windows.counts(slot, 20));
    }
}
