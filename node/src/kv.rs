//! The KV pool's books: which block is free, referenced or cached. Pure accounting; the tensors live with the model.
//!
//! A block holds the keys and values of [`BLOCK_TOKENS`] tokens for all layers. A full block is sealed with a hash over its tokens and
//! all tokens before it, and found again by that hash: the prefix cache. A sealed block that nobody references is evictable, the
//! longest unused first; it is never written again.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

/// Tokens in one block.
pub const BLOCK_TOKENS: usize = 16;

/// One block of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Hash of a full block's tokens and all tokens before it; 128 bits of SHA-256, so that no client can build a collision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// The hash of `tokens` after a prefix that hashes to `parent`.
    pub fn chain(parent: Option<Self>, tokens: &[u32]) -> Self {
        let mut sha = Sha256::new();
        sha.update(parent.map_or([0; 16], |p| p.0));
        for token in tokens {
            sha.update(token.to_le_bytes());
        }
        let digest = sha.finalize();
        let mut half = [0; 16];
        half.copy_from_slice(&digest[..16]);
        Self(half)
    }
}

#[derive(Debug, Clone, Default)]
struct Block {
    references: u32,
    hash: Option<BlockHash>,
    /// Key in `evictable` while nobody references the block.
    idle_since: u64,
}

/// How many blocks are in which state; the three add up to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Empty.
    pub free: usize,
    /// In use by one sequence or more.
    pub referenced: usize,
    /// Full, found by hash, evictable.
    pub cached: usize,
}

/// The pool's books.
#[derive(Debug)]
pub struct KvPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    by_hash: HashMap<BlockHash, BlockId>,
    evictable: BTreeMap<u64, BlockId>,
    clock: u64,
}

impl KvPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).expect("a pool has fewer than 2^32 blocks");
        Self {
            blocks: vec![Block::default(); blocks],
            free: (0..count).rev().map(BlockId).collect(),
            by_hash: HashMap::new(),
            evictable: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks that [`allocate`](Self::allocate) could hand out.
    pub fn available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    /// All blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the pool has no blocks at all.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks of the longest known prefix of a chain of hashes. They are not taken; see [`take`](Self::take).
    pub fn find(&self, chain: &[BlockHash]) -> Vec<BlockId> {
        chain.iter().map_while(|hash| self.by_hash.get(hash).copied()).collect()
    }

    /// One reference more to each of these blocks, which [`find`](Self::find) has just found.
    pub fn take(&mut self, blocks: &[BlockId]) {
        blocks.iter().for_each(|id| self.reference(*id));
    }

    /// An empty block with one reference; evicts the longest unused cached block when none is free.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = self.free.pop().or_else(|| self.evict())?;
        self.block(id).references = 1;
        Some(id)
    }

    /// Makes a full block findable by `hash`, and gives the one to be used from now on. When another has the same content already, it is
    /// that one, with the reference that this one had.
    #[must_use]
    pub fn seal(&mut self, id: BlockId, hash: BlockHash) -> BlockId {
        if let Some(known) = self.by_hash.get(&hash).copied() {
            self.reference(known);
            self.release(id);
            return known;
        }
        self.by_hash.insert(hash, id);
        self.block(id).hash = Some(hash);
        id
    }

    /// Gives one reference back.
    pub fn release(&mut self, id: BlockId) {
        self.clock += 1;
        let clock = self.clock;
        let block = self.block(id);
        assert!(block.references > 0, "a block is released as often as it was taken");
        block.references -= 1;
        if block.references > 0 {
            return;
        }
        block.idle_since = clock;
        match block.hash {
            Some(_) => {
                self.evictable.insert(clock, id);
            }
            None => self.free.push(id),
        }
    }

    /// How many references a block has.
    pub fn references(&self, id: BlockId) -> u32 {
        self.blocks[id.0 as usize].references
    }

    /// The pool at a glance.
    pub fn counts(&self) -> Counts {
        let referenced = self.blocks.iter().filter(|b| b.references > 0).count();
        Counts { free: self.free.len(), referenced, cached: self.evictable.len() }
    }

    /// Whether the books balance: free + referenced + cached = all.
    pub fn is_balanced(&self) -> bool {
        let Counts { free, referenced, cached } = self.counts();
        free + referenced + cached == self.blocks.len()
    }

    fn block(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    fn reference(&mut self, id: BlockId) {
        let block = self.block(id);
        block.references += 1;
        if block.references == 1 {
            let idle_since = block.idle_since;
            self.evictable.remove(&idle_since);
        }
    }

    fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = self.evictable.pop_first()?;
        let hash = self.block(id).hash.take().expect("an evictable block is sealed");
        self.by_hash.remove(&hash);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed(pool: &mut KvPool, tokens: &[u32]) -> Vec<BlockId> {
        let mut parent = None;
        let chunks = tokens.chunks_exact(BLOCK_TOKENS);
        chunks
            .map(|chunk| {
                let id = pool.allocate().unwrap();
                let hash = BlockHash::chain(parent, chunk);
                parent = Some(hash);
                pool.seal(id, hash)
            })
            .collect()
    }

    fn chain(tokens: &[u32]) -> Vec<BlockHash> {
        let mut chain = Vec::new();
        for full in tokens.chunks_exact(BLOCK_TOKENS) {
            chain.push(BlockHash::chain(chain.last().copied(), full));
        }
        chain
    }

    #[test]
    fn a_prefix_is_found_again_until_it_is_evicted() {
        let mut pool = KvPool::new(3);
        let tokens: Vec<u32> = (0..32).collect();
        let blocks = sealed(&mut pool, &tokens);
        blocks.iter().rev().for_each(|b| pool.release(*b));
        assert_eq!(pool.counts(), Counts { free: 1, referenced: 0, cached: 2 });

        let found = pool.find(&chain(&tokens));
        assert_eq!(found, blocks);
        pool.take(&found);
        assert_eq!((pool.available(), pool.references(found[0])), (1, 1));
        found.iter().rev().for_each(|b| pool.release(*b));

        // the tail goes first, so what is left is still a prefix
        pool.allocate().unwrap();
        pool.allocate().unwrap();
        assert_eq!(pool.find(&chain(&tokens)).len(), 1);
        assert!(pool.is_balanced());
    }

    #[test]
    fn of_two_blocks_of_the_same_content_one_is_kept() {
        let mut pool = KvPool::new(2);
        let (first, second) = (sealed(&mut pool, &[1; 16]), sealed(&mut pool, &[1; 16]));
        assert_eq!(first, second);
        assert_eq!((pool.references(first[0]), pool.counts().free), (2, 1));
        // it stays for as long as one of the two uses it
        pool.release(first[0]);
        assert_eq!(pool.counts(), Counts { free: 1, referenced: 1, cached: 0 });
    }

    #[test]
    fn the_same_block_after_another_prefix_is_another_block() {
        let a = BlockHash::chain(None, &[1; 16]);
        assert_ne!(BlockHash::chain(Some(a), &[2; 16]), BlockHash::chain(None, &[2; 16]));
    }

    proptest! {
        /// Law: whatever is taken, sealed and released, free + referenced + cached = all, and no block is handed out twice.
        #[test]
        fn the_books_always_balance(ops in prop::collection::vec((0u8..3, 0u32..6), 1..300)) {
            let mut pool = KvPool::new(12);
            let mut held: Vec<BlockId> = Vec::new();
            for (op, x) in ops {
                match op {
                    0 => if let Some(id) = pool.allocate() {
                        prop_assert_eq!(pool.references(id), 1);
                        held.push(pool.seal(id, BlockHash::chain(None, &[x; 16])));
                    },
                    1 => {
                        let found = pool.find(&[BlockHash::chain(None, &[x; 16])]);
                        pool.take(&found);
                        held.extend(found);
                    },
                    _ => if !held.is_empty() {
                        let id = held.swap_remove(x as usize % held.len());
                        pool.release(id);
                    },
                }
                prop_assert!(pool.is_balanced());
                let references: u32 = (0..12).map(|i| pool.references(BlockId(i))).sum();
                prop_assert_eq!(references as usize, held.len());
            }
        }
    }
}
