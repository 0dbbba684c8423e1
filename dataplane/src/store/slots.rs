//! Which slots are in use: a bitmap with a summary, and a cursor that walks on.

/// The free and used slots of a disk.
#[derive(Debug)]
pub(super) struct Slots {
    words: Vec<u64>,
    /// Bit per word: it has a free slot.
    summary: Vec<u64>,
    free: u64,
    cursor: usize,
}

impl Slots {
    /// All `count` slots free.
    pub(super) fn new(count: u64) -> Self {
        let mut words = vec![0u64; count.div_ceil(64) as usize];
        if count % 64 != 0 {
            *words.last_mut().expect("at least one slot") = u64::MAX << (count % 64);
        }
        let mut summary = vec![0u64; words.len().div_ceil(64)];
        for word in 0..words.len() {
            summary[word / 64] |= 1 << (word % 64);
        }
        Slots {
            words,
            summary,
            free: count,
            cursor: 0,
        }
    }

    /// Takes a free slot, the next after the last one taken.
    #[inline]
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        let groups = self.summary.len();
        let (start, bit) = (self.cursor / 64, self.cursor % 64);
        // The first group is looked at twice: from the cursor's word on, and at the end its words before the cursor.
        for step in 0..=groups {
            let group = (start + step) % groups;
            let mask = if step == 0 { u64::MAX << bit } else { u64::MAX };
            let candidates = self.summary[group] & mask;
            if candidates != 0 {
                let word = group * 64 + candidates.trailing_zeros() as usize;
                let slot = word * 64 + (!self.words[word]).trailing_zeros() as usize;
                self.cursor = word;
                self.mark(slot as u32);
                return Some(slot as u32);
            }
        }
        unreachable!("the count of free slots and the bitmap agree")
    }

    /// Marks a slot used; it was free.
    pub(super) fn mark(&mut self, slot: u32) {
        let (word, bit) = (slot as usize / 64, slot % 64);
        assert!(self.words[word] >> bit & 1 == 0, "slot {slot} taken twice");
        self.words[word] |= 1 << bit;
        if self.words[word] == u64::MAX {
            self.summary[word / 64] &= !(1 << (word % 64));
        }
        self.free -= 1;
    }

    /// Gives a slot back; it was used.
    pub(super) fn give(&mut self, slot: u32) {
        let (word, bit) = (slot as usize / 64, slot % 64);
        assert!(self.words[word] >> bit & 1 == 1, "slot {slot} freed twice");
        self.words[word] &= !(1 << bit);
        self.summary[word / 64] |= 1 << (word % 64);
        self.free += 1;
    }

    /// Free slots.
    pub(super) fn free(&self) -> u64 {
        self.free
    }
}
