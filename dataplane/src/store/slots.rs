//! Which slots are in use: a bitmap. Slots are taken from windows of it, see `window.rs`.

/// Slots of a window.
pub(super) const WINDOW: u32 = 1024;
const WORDS: usize = WINDOW as usize / 64;

/// The free and used slots of a disk.
#[derive(Debug)]
pub(super) struct Slots {
    words: Vec<u64>,
    free: u64,
}

impl Slots {
    /// All `count` slots free.
    pub(super) fn new(count: u64) -> Self {
        let mut words = vec![0u64; count.div_ceil(64) as usize];
        if !count.is_multiple_of(64) {
            *words.last_mut().expect("at least one slot") = u64::MAX << (count % 64);
        }
        Slots { words, free: count }
    }

    /// Takes a free slot of a window.
    #[inline]
    pub(super) fn take_in(&mut self, window: u32) -> Option<u32> {
        let first = window as usize * WORDS;
        let end = (first + WORDS).min(self.words.len());
        let word = (first..end).find(|&word| self.words[word] != u64::MAX)?;
        let slot = (word * 64) as u32 + (!self.words[word]).trailing_zeros();
        self.mark(slot);
        Some(slot)
    }

    /// Free slots of a window.
    pub(super) fn free_in(&self, window: u32) -> u32 {
        let first = window as usize * WORDS;
        let end = (first + WORDS).min(self.words.len());
        self.words[first..end].iter().map(|word| word.count_zeros()).sum()
    }

    /// Windows of the disk.
    pub(super) fn windows(&self) -> u32 {
        self.words.len().div_ceil(WORDS) as u32
    }

    /// The slot is free.
    pub(super) fn is_free(&self, slot: u32) -> bool {
        self.words[slot as usize / 64] >> (slot % 64) & 1 == 0
    }

    /// Marks a slot used; it was free.
    pub(super) fn mark(&mut self, slot: u32) {
        let (word, bit) = (slot as usize / 64, slot % 64);
        assert!(self.words[word] >> bit & 1 == 0, "slot {slot} taken twice");
        self.words[word] |= 1 << bit;
        self.free -= 1;
    }

    /// Gives a slot back; it was used.
    pub(super) fn give(&mut self, slot: u32) {
        let (word, bit) = (slot as usize / 64, slot % 64);
        assert!(self.words[word] >> bit & 1 == 1, "slot {slot} freed twice");
        self.words[word] &= !(1 << bit);
        self.free += 1;
    }

    /// Free slots.
    pub(super) fn free(&self) -> u64 {
        self.free
    }
}
