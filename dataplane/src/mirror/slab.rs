//! A table with stable indexes and a free list: what is in it is named by its index and never moves.

/// No index.
pub(super) const NIL: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<T>,
    used: Vec<bool>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab {
            items: Vec::new(),
            used: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T: Default> Slab<T> {
    /// Takes a place; what was there last is still there.
    #[inline]
    pub(super) fn take(&mut self) -> u32 {
        let i = self.free.pop().unwrap_or_else(|| {
            self.items.push(T::default());
            self.used.push(false);
            self.items.len() as u32 - 1
        });
        self.used[i as usize] = true;
        i
    }

    #[inline]
    pub(super) fn give(&mut self, i: u32) {
        assert!(self.used[i as usize], "a place is given back once");
        self.used[i as usize] = false;
        self.free.push(i);
    }

    #[inline]
    pub(super) fn is_used(&self, i: u32) -> bool {
        self.used.get(i as usize).copied().unwrap_or(false)
    }

    pub(super) fn live(&self) -> usize {
        self.items.len() - self.free.len()
    }

    /// One more than the highest index ever used.
    pub(super) fn len(&self) -> u32 {
        self.items.len() as u32
    }
}

impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;
    #[inline]
    fn index(&self, i: u32) -> &T {
        &self.items[i as usize]
    }
}

impl<T> std::ops::IndexMut<u32> for Slab<T> {
    #[inline]
    fn index_mut(&mut self, i: u32) -> &mut T {
        &mut self.items[i as usize]
    }
}
