//! One sequence: its tokens, and how far their keys and values are computed.

use super::share::ShareId;
use crate::kv::{BLOCK_TOKENS, BlockHash, BlockId, KvPool};

/// What a sequence asks of the steps that compute it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Terms {
    /// Logits after every token of the prompt, not only the last: no prefix cache, and small pieces.
    pub all_logits: bool,
    /// Which hidden states.
    pub states: States,
}

/// Which hidden states a sequence asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum States {
    /// None.
    #[default]
    None,
    /// After its last token.
    Last,
    /// After each: no prefix cache.
    All,
}

/// A sequence's tokens, and how far their keys and values are computed.
#[derive(Debug)]
pub struct Sequence {
    pub(super) share: ShareId,
    pub(super) runs: bool,
    terms: Terms,
    tokens: Vec<u32>,
    /// Guesses at what follows the last token, computed with it; a block that only they need is there for no longer than they are.
    proposed: Vec<u32>,
    /// Tokens whose keys and values stand in the blocks.
    pub(super) computed: usize,
    pub(super) blocks: Vec<BlockId>,
    /// Hashes of the leading full blocks, as far as they have been asked for; they hold for the sequence's life.
    chain: Vec<BlockHash>,
    /// How many leading blocks can be found by their hashes.
    sealed: usize,
}

impl Sequence {
    pub(super) fn new(share: ShareId, tokens: Vec<u32>, terms: Terms) -> Self {
        let (proposed, blocks, chain) = (Vec::new(), Vec::new(), Vec::new());
        Self { share, runs: false, terms, tokens, proposed, computed: 0, blocks, chain, sealed: 0 }
    }

    /// What it asks for.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// All tokens, prompt first.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Guesses at what follows its last token, that this step computes.
    pub fn proposed(&self) -> &[u32] {
        &self.proposed
    }

    /// Where the keys and values stand, in order of position.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens still to be computed.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// What is found in the cache is not computed, so nothing can be read off it.
    pub(super) fn uses_prefix_cache(&self) -> bool {
        !self.terms.all_logits && self.terms.states != States::All
    }

    /// How many guesses could be computed with its last token, if it had `spare` more blocks. None where something is read off its
    /// rows: they would be taken for its own.
    pub(super) fn proposable(&self, spare: usize) -> usize {
        let is_plain = self.terms == Terms::default();
        if is_plain { (self.blocks.len() + spare) * BLOCK_TOKENS - self.tokens.len() } else { 0 }
    }

    /// Guesses at what follows its last token; the caller has checked that there are blocks for them.
    pub(super) fn propose(&mut self, tokens: &[u32], kv: &mut KvPool) {
        self.proposed.extend_from_slice(tokens);
        let wanted = (self.tokens.len() + self.proposed.len()).div_ceil(BLOCK_TOKENS);
        for _ in self.blocks.len()..wanted {
            self.blocks.push(kv.allocate().expect("availability was checked"));
        }
    }

    /// Appends a sampled token. When it is the one that was guessed, its keys and values stand in the blocks already; otherwise all
    /// guesses after it are void, and what they wrote is written anew before anybody reads it.
    pub(super) fn push(&mut self, token: u32, kv: &mut KvPool) {
        self.tokens.push(token);
        if self.proposed.first() == Some(&token) {
            self.proposed.remove(0);
            self.advance(1, kv);
        } else {
            self.proposed.clear();
            let unused = self.blocks_wanted().min(self.blocks.len());
            self.blocks.drain(unused..).for_each(|block| kv.release(block));
        }
    }

    /// Blocks that all its present tokens take.
    pub(super) fn blocks_wanted(&self) -> usize {
        self.tokens.len().div_ceil(BLOCK_TOKENS)
    }

    /// Hashes of the blocks from its next token on that may be found in the prefix cache. At least one token stays to be computed: its
    /// logits are what comes next.
    pub(super) fn findable(&mut self) -> &[BlockHash] {
        if !self.uses_prefix_cache() {
            return &[];
        }
        let end = (self.tokens.len() - 1) / BLOCK_TOKENS;
        self.hash_blocks(end);
        &self.chain[self.computed / BLOCK_TOKENS..end]
    }

    /// Goes on after what was found of its [`findable`](Self::findable) blocks, which replace its own; gives how many tokens need not be
    /// computed for that.
    pub(super) fn reuse(&mut self, found: Vec<BlockId>, kv: &mut KvPool) -> usize {
        if found.is_empty() {
            return 0;
        }
        kv.take(&found);
        let start = self.computed / BLOCK_TOKENS;
        let end = start + found.len();
        // a sequence that is only let in has none of its own
        let own = start..end.min(self.blocks.len());
        self.blocks.splice(own, found).for_each(|block| kv.release(block));
        let before = std::mem::replace(&mut self.computed, end * BLOCK_TOKENS);
        self.sealed = end;
        self.computed - before
    }

    /// Hashes of the blocks that are full once its next `len` tokens are computed, and are not yet.
    pub(super) fn filled_by(&mut self, len: usize) -> &[BlockHash] {
        let (start, end) = (self.computed / BLOCK_TOKENS, (self.computed + len) / BLOCK_TOKENS);
        self.hash_blocks(end);
        &self.chain[start..end]
    }

    /// `len` more tokens are computed; blocks that became full can be found from now on.
    pub(super) fn advance(&mut self, len: usize, kv: &mut KvPool) {
        self.computed += len;
        let full = self.computed / BLOCK_TOKENS;
        self.hash_blocks(full);
        (self.sealed..full).for_each(|i| self.blocks[i] = kv.seal(self.blocks[i], self.chain[i]));
        self.sealed = full;
    }

    /// Gives its blocks back, the last one first, so that what stays cached longest is a prefix.
    pub(super) fn give_back(&mut self, kv: &mut KvPool) {
        self.blocks.drain(..).rev().for_each(|block| kv.release(block));
        self.proposed.clear();
        (self.sealed, self.computed) = (0, 0);
    }

    fn hash_blocks(&mut self, count: usize) {
        for i in self.chain.len()..count {
            let tokens = &self.tokens[i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS];
            self.chain.push(BlockHash::chain(self.chain.last().copied(), tokens));
        }
    }
}
