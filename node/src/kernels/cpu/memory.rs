//! Memory for what is read whole in every step: weights and keys and values. Anonymous pages, huge ones where the system has them, since
//! the processor's prefetchers stop at the end of a page: reading weights from pages of 2 MiB was 1.4 to 1.6 times as fast here.

use std::{
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use memmap2::MmapMut;

/// Address space taken at a time. What is not written to costs nothing.
const REGION_BYTES: usize = if cfg!(miri) { 1 << 20 } else { 64 << 20 };

/// Every slab begins at a cache line.
const ALIGN: usize = 64;

const HUGE_PAGE: usize = if cfg!(miri) { 1 << 12 } else { 2 << 20 };

/// Hands out pieces of large regions, so that small matrices share huge pages. Nothing is reused; a region goes when its last slab goes.
#[derive(Debug, Default)]
pub(crate) struct Arena(Mutex<Option<Open>>);

/// The region that has room left.
#[derive(Debug)]
struct Open {
    region: Arc<Region>,
    used: usize,
}

#[derive(Debug)]
struct Region {
    /// First byte at a huge page's boundary.
    start: NonNull<u8>,
    len: usize,
    _map: MmapMut,
}

// SAFETY: a region is plain memory; slabs are disjoint parts of it, each with one owner
unsafe impl Send for Region {}
// SAFETY: as above
unsafe impl Sync for Region {}

/// Zeroed bytes with one owner.
#[derive(Debug)]
pub(crate) struct Slab {
    start: NonNull<u8>,
    len: usize,
    _region: Arc<Region>,
}

// SAFETY: a slab owns its bytes as a `Box<[u8]>` does
unsafe impl Send for Slab {}
// SAFETY: as above
unsafe impl Sync for Slab {}

impl Arena {
    /// `len` zeroed bytes at a cache line's boundary.
    ///
    /// # Panics
    /// When the system has no address space left, as any allocation does.
    pub(crate) fn slab(&self, len: usize) -> Slab {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |open: &Open| open.region.len - open.used >= len;
        if !open.as_ref().is_some_and(fits) {
            *open = Some(Open { region: Arc::new(Region::new(len.max(REGION_BYTES))), used: 0 });
        }
        let Open { region, used } = open.as_mut().expect("a region is open");
        // SAFETY: `used + len` is within the region
        let start = unsafe { region.start.add(*used) };
        *used = (*used + len.next_multiple_of(ALIGN)).min(region.len);
        Slab { start, len, _region: region.clone() }
    }
}

impl Region {
    fn new(len: usize) -> Self {
        let mut map = MmapMut::map_anon(len + HUGE_PAGE).expect("the system has memory");
        #[cfg(all(target_os = "linux", not(miri)))]
        // without huge pages everything works, only slower
        let _ = map.advise(memmap2::Advice::HugePage);
        let skipped = map.as_ptr().align_offset(HUGE_PAGE);
        let start = NonNull::new(map[skipped..].as_mut_ptr()).expect("mapped memory is not at zero");
        Self { start, len, _map: map }
    }
}

impl Deref for Slab {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: these bytes are mapped as long as the region lives, and belong to this slab alone
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Slab {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_are_apart_aligned_zeroed_and_outlive_the_arena() {
        let arena = Arena::default();
        let mut slabs: Vec<Slab> = [100, 1, REGION_BYTES, 4096, 0].map(|len| arena.slab(len)).into();
        drop(arena);
        for (i, slab) in slabs.iter_mut().enumerate() {
            assert_eq!(slab.as_ptr().align_offset(ALIGN), 0);
            assert!(slab.iter().take(5000).all(|byte| *byte == 0));
            slab.fill(i as u8 + 1);
        }
        assert!(slabs.iter().enumerate().all(|(i, slab)| slab.iter().all(|byte| *byte == i as u8 + 1)));
    }
}
