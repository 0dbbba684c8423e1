//! Pages of extent records in memory, within a fixed budget.
//!
//! A frame is free, loading, clean or dirty. Only clean frames that no checkpoint is writing are given to other pages;
//! which one is found by a clock hand with a second chance. A dirty frame becomes clean when a checkpoint has copied it.

use super::ops::List;

/// Fewest frames.
pub(super) const FRAMES_MIN: usize = 8;
/// No frame.
pub(super) const NO_FRAME: u32 = u32::MAX;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing.
    Nothing,
    /// A page that is being read.
    Loading,
    /// A page.
    Page,
}

/// A frame.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) page: u32,
    pub(super) held: Held,
    pub(super) dirty: bool,
    /// A checkpoint is writing a copy: the disk does not have it yet.
    pub(super) writing: bool,
    recent: bool,
    pub(super) waiters: List,
}

/// The cache. Frame `f` is page `f` of the store's arena.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) frames: Vec<Frame>,
    of_page: Vec<u32>,
    hand: usize,
    pub(super) dirty: usize,
    pub(super) hits: u64,
    pub(super) misses: u64,
}

impl Cache {
    pub(super) fn new(frames: usize, pages: u64) -> Self {
        let frame = || Frame {
            page: 0,
            held: Held::Nothing,
            dirty: false,
            writing: false,
            recent: false,
            waiters: List::EMPTY,
        };
        Cache {
            frames: (0..frames).map(|_| frame()).collect(),
            of_page: vec![NO_FRAME; pages as usize],
            hand: 0,
            dirty: 0,
            hits: 0,
            misses: 0,
        }
    }

    /// The frame of a page, if it has one; it may be loading.
    #[inline]
    pub(super) fn find(&mut self, page: u32) -> Option<u32> {
        let f = self.of_page[page as usize];
        if f == NO_FRAME {
            return None;
        }
        self.frames[f as usize].recent = true;
        Some(f)
    }

    /// The frame of a page, which does not count as a use.
    #[inline]
    pub(super) fn peek(&self, page: u32) -> Option<u32> {
        let f = self.of_page[page as usize];
        (f != NO_FRAME).then_some(f)
    }

    /// Gives a page a frame, to be loaded. `None`: all are dirty or loading.
    pub(super) fn assign(&mut self, page: u32) -> Option<u32> {
        for _ in 0..2 * self.frames.len() + 1 {
            let f = self.hand;
            self.hand = (self.hand + 1) % self.frames.len();
            let frame = &mut self.frames[f];
            match frame.held {
                Held::Loading => continue,
                Held::Page if frame.dirty || frame.writing => continue,
                Held::Page if frame.recent => {
                    frame.recent = false;
                    continue;
                }
                Held::Page => self.of_page[frame.page as usize] = NO_FRAME,
                Held::Nothing => {}
            }
            frame.page = page;
            frame.held = Held::Loading;
            frame.recent = true;
            self.of_page[page as usize] = f as u32;
            self.misses += 1;
            return Some(f as u32);
        }
        None
    }

    /// The frame's page was changed.
    #[inline]
    pub(super) fn soil(&mut self, f: u32) {
        let frame = &mut self.frames[f as usize];
        if !frame.dirty {
            frame.dirty = true;
            self.dirty += 1;
        }
    }

    /// The frame's page was copied and is being written.
    pub(super) fn begin_write(&mut self, f: u32) {
        let frame = &mut self.frames[f as usize];
        assert!(frame.dirty && !frame.writing);
        frame.dirty = false;
        frame.writing = true;
        self.dirty -= 1;
    }
}
