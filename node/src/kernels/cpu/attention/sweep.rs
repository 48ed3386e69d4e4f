//! A few queries over the keys and values of one partition of a sequence: scores, softmax with a running maximum (Milakov & Gimelshein
//! 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135) and the weighted sum of values, chunk by chunk.
//!
//! What one query adds up, and in which order, follows from its own position alone: chunks begin at fixed positions, a score is one sum
//! over `D`, an output one sum over positions. Queries only share what is read.

// loops over registers go by number: several arrays beside each other, of lengths known to the compiler
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::cache::{Element, Page, Pages, padded};
use crate::{
    kernels::cpu::simd::{Kernel, LANES, Simd, sum_lanes},
    kv::BLOCK_TOKENS,
};

/// Positions between two looks at the maximum.
const CHUNK: usize = 128;

/// Positions that are summed up on their own, and then merged in order: the unit in which a long context is shared by threads.
pub(super) const PARTITION: usize = 512;

const CHUNK_BLOCKS: usize = CHUNK / BLOCK_TOKENS;

/// What a query has seen: the maximum in every lane, a sum of weights for each lane, and the weighted sum of values, `[P]`.
#[derive(Debug)]
pub(super) struct State<'a> {
    top: &'a mut [f32; LANES],
    sums: &'a mut [f32; LANES],
    mixed: &'a mut [[f32; LANES]],
}

impl<'a> State<'a> {
    /// Registers that it takes.
    pub(super) fn registers(dim: usize) -> usize {
        2 + padded(dim) / LANES
    }

    pub(super) fn of(registers: &'a mut [[f32; LANES]]) -> Self {
        let [top, sums, mixed @ ..] = registers else { panic!("a state has its registers") };
        Self { top, sums, mixed }
    }

    /// As if nothing had been seen.
    pub(super) fn clear(registers: &mut [[f32; LANES]]) {
        registers.fill([0.0; LANES]);
        registers[0] = [f32::NEG_INFINITY; LANES];
    }
}

/// Puts what `later` has seen behind what `earlier` has.
pub(super) struct Merge<'a> {
    pub(super) earlier: &'a mut [[f32; LANES]],
    pub(super) later: &'a [[f32; LANES]],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let nothing = f32::NEG_INFINITY;
        if self.later[0][0] == nothing {
            return;
        }
        if self.earlier[0][0] == nothing {
            return self.earlier.copy_from_slice(self.later);
        }
        let (a, b) = (s.load(&self.earlier[0]), s.load(&self.later[0]));
        let top = s.max(a, b);
        let (a, b) = (s.exp(s.sub(a, top)), s.exp(s.sub(b, top)));
        s.store(top, &mut self.earlier[0]);
        for (earlier, later) in self.earlier.iter_mut().zip(self.later).skip(1) {
            s.store(s.mul_add(s.load(later), b, s.mul(s.load(earlier), a)), earlier);
        }
    }
}

/// Writes the weighted mean of the values that were seen.
pub(super) struct Finish<'a> {
    pub(super) state: &'a mut [[f32; LANES]],
    pub(super) out: &'a mut [f32],
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let State { sums, mixed, .. } = State::of(self.state);
        let inverse = s.splat(1.0 / sum_lanes(*sums));
        for (mixed, out) in mixed.iter_mut().zip(self.out.chunks_mut(LANES)) {
            s.store(s.mul(s.load(mixed), inverse), mixed);
            out.copy_from_slice(&mixed[..out.len()]);
        }
    }
}

/// `Q` queries of one sequence over the positions that they see, at most a partition.
pub(super) struct Sweep<'a, E, const Q: usize> {
    pub(super) pages: Pages<'a, E>,
    /// The sequence's block table.
    pub(super) blocks: &'a [u32],
    /// Positions that each query sees here, perhaps none.
    pub(super) seen: [Range<usize>; Q],
    /// `[D, Q]`, with the factor of the scores in them.
    pub(super) queries: &'a [[f32; Q]],
    /// `Q` states one after another; overwritten.
    pub(super) states: &'a mut [[f32; LANES]],
}

/// Scores, and then weights: `[Q, 128]`.
type Scores<const Q: usize> = [[[f32; LANES]; CHUNK_BLOCKS]; Q];

impl<E: Element, const Q: usize> Kernel for Sweep<'_, E, Q> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if const { Q > 4 && !S::HAS_MANY_REGISTERS } {
            unreachable!("more sums than fit the registers")
        }
        let Self { pages, blocks, seen, queries, states } = self;
        let registers = State::registers(pages.dim());
        states.chunks_exact_mut(registers).for_each(State::clear);
        let some = || seen.iter().filter(|seen| !seen.is_empty());
        let first = some().map(|seen| seen.start).min().unwrap_or(0);
        let end = some().map(|seen| seen.end).max().unwrap_or(0);
        let mut scores: Scores<Q> = [[[0.0; LANES]; CHUNK_BLOCKS]; Q];
        for start in (first / CHUNK * CHUNK..end).step_by(CHUNK) {
            let within = |p: usize| p.clamp(start, start + CHUNK) - start;
            let chunk = Chunk { pages, blocks: &blocks[start / BLOCK_TOKENS..] };
            let seen = seen.each_ref().map(|seen| within(seen.start)..within(seen.end));
            chunk.score(s, within(first)..within(end), queries, &mut scores);
            for (q, state) in states.chunks_exact_mut(registers).enumerate().filter(|(q, _)| !seen[*q].is_empty()) {
                chunk.weigh(s, seen[q].clone(), &mut scores[q], State::of(state));
            }
            chunk.mix(s, &seen, &scores, states);
        }
    }
}

/// Up to [`CHUNK`] positions.
#[derive(Clone, Copy)]
struct Chunk<'a, E> {
    pages: Pages<'a, E>,
    blocks: &'a [u32],
}

impl<'a, E: Element> Chunk<'a, E> {
    #[inline(always)]
    fn page(&self, block: usize) -> Page<'a, E> {
        self.pages.page(self.blocks[block])
    }

    /// `scores = queries @ keys`, for whole blocks.
    #[inline(always)]
    fn score<S: Simd, const Q: usize>(
        &self,
        s: S,
        positions: Range<usize>,
        queries: &[[f32; Q]],
        scores: &mut Scores<Q>,
    ) {
        let mut block = positions.start / BLOCK_TOKENS;
        let end = positions.end.div_ceil(BLOCK_TOKENS);
        // as many blocks side by side as sums fit the registers: one sum after another would wait for itself
        while block < end {
            let left = end - block;
            block += match (S::HAS_MANY_REGISTERS, Q) {
                (true, ..=4) if left >= 4 => self.score_blocks::<S, Q, 4>(s, block, queries, scores),
                (true, _) | (false, ..=2) if left >= 2 => self.score_blocks::<S, Q, 2>(s, block, queries, scores),
                _ => self.score_blocks::<S, Q, 1>(s, block, queries, scores),
            };
        }
    }

    #[inline(always)]
    fn score_blocks<S: Simd, const Q: usize, const N: usize>(
        &self,
        s: S,
        first: usize,
        queries: &[[f32; Q]],
        scores: &mut Scores<Q>,
    ) -> usize {
        let pages: [Page<'_, E>; N] = std::array::from_fn(|n| self.page(first + n));
        let keys: [&[[E; LANES]]; N] = std::array::from_fn(|n| &pages[n].keys[..queries.len()]);
        let mut sums = [[s.splat(0.0); N]; Q];
        for (d, query) in queries.iter().enumerate() {
            let mut key = [s.splat(0.0); N];
            for n in 0..N {
                key[n] = E::widen(s, &keys[n][d]);
            }
            for q in 0..Q {
                let query = s.splat(query[q]);
                for n in 0..N {
                    sums[q][n] = s.mul_add(query, key[n], sums[q][n]);
                }
            }
        }
        for n in 0..N {
            for q in 0..Q {
                let sum = if E::IS_SCALED { s.mul(sums[q][n], s.load(&pages[n].scales[0])) } else { sums[q][n] };
                s.store(sum, &mut scores[q][first + n]);
            }
        }
        N
    }

    /// Scores to weights, zero outside of `seen`; what was summed up before is brought to the new maximum.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        s: S,
        seen: Range<usize>,
        scores: &mut [[f32; LANES]; CHUNK_BLOCKS],
        State { top, sums, mixed }: State<'_>,
    ) {
        let blocks = seen.start / LANES..seen.end.div_ceil(LANES);
        let flat = scores.as_flattened_mut();
        flat[blocks.start * LANES..seen.start].fill(f32::NEG_INFINITY);
        flat[seen.end..blocks.end * LANES].fill(f32::NEG_INFINITY);
        let before = s.load(top);
        let mut tops = before;
        for scores in &scores[blocks.clone()] {
            tops = s.max(tops, s.load(scores));
        }
        let highest = s.array(tops).into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b });
        if highest > top[0] {
            let now = s.splat(highest);
            let factor = s.exp(s.sub(before, now));
            s.store(now, top);
            s.store(s.mul(s.load(sums), factor), sums);
            for x in mixed {
                s.store(s.mul(s.load(x), factor), x);
            }
        }
        let (now, mut total) = (s.load(top), s.load(sums));
        for block in blocks {
            let weights = s.exp(s.sub(s.load(&scores[block]), now));
            total = s.add(total, weights);
            let weights = if E::IS_SCALED { s.mul(weights, s.load(&self.page(block).scales[1])) } else { weights };
            s.store(weights, &mut scores[block]);
        }
        s.store(total, sums);
    }

    /// `mixed[Q, P] += weights @ values`, position after position.
    #[inline(always)]
    fn mix<S: Simd, const Q: usize>(
        &self,
        s: S,
        seen: &[Range<usize>; Q],
        weights: &Scores<Q>,
        states: &mut [[f32; LANES]],
    ) {
        let registers = states.len() / Q;
        let start = seen.iter().map(|seen| seen.start).fold(0, usize::max);
        let end = seen.iter().map(|seen| seen.end).fold(CHUNK, usize::min);
        let shared = start.min(end)..end;
        // a query never touches what it does not see, not even with a weight of zero: what stands there may be infinite
        for edge in [Some(0..shared.start), None, Some(shared.end..CHUNK)] {
            let Some(edge) = edge else {
                self.mix_shared::<S, Q>(s, shared.clone(), weights.each_ref(), states);
                continue;
            };
            for (q, state) in states.chunks_exact_mut(registers).enumerate() {
                let positions = seen[q].start.max(edge.start)..seen[q].end.min(edge.end);
                self.mix_shared::<S, 1>(s, positions, [&weights[q]], state);
            }
        }
    }

    #[inline(always)]
    fn mix_shared<S: Simd, const Q: usize>(
        &self,
        s: S,
        positions: Range<usize>,
        weights: [&[[f32; LANES]; CHUNK_BLOCKS]; Q],
        states: &mut [[f32; LANES]],
    ) {
        if positions.is_empty() {
            return;
        }
        let registers = states.len() / Q;
        let end = registers - 2;
        let mut column = 0;
        // as many columns side by side as sums fit the registers
        while column < end {
            let left = end - column;
            column += match (S::HAS_MANY_REGISTERS, Q) {
                (true, ..=4) if left >= 4 => self.mix_columns::<S, Q, 4>(s, column, positions.clone(), weights, states),
                (true, _) | (false, ..=2) if left >= 2 => {
                    self.mix_columns::<S, Q, 2>(s, column, positions.clone(), weights, states)
                }
                _ => self.mix_columns::<S, Q, 1>(s, column, positions.clone(), weights, states),
            };
        }
    }

    #[inline(always)]
    fn mix_columns<S: Simd, const Q: usize, const N: usize>(
        &self,
        s: S,
        column: usize,
        positions: Range<usize>,
        weights: [&[[f32; LANES]; CHUNK_BLOCKS]; Q],
        states: &mut [[f32; LANES]],
    ) -> usize {
        let registers = states.len() / Q;
        let at = |q: usize, n: usize| q * registers + 2 + column + n;
        let mut sums = [[s.splat(0.0); N]; Q];
        for q in 0..Q {
            for n in 0..N {
                sums[q][n] = s.load(&states[at(q, n)]);
            }
        }
        for block in positions.start / BLOCK_TOKENS..positions.end.div_ceil(BLOCK_TOKENS) {
            let page = self.page(block);
            let weights: [&[f32; LANES]; Q] = std::array::from_fn(|q| &weights[q][block]);
            let within = |p: usize| p.clamp(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) - block * BLOCK_TOKENS;
            for p in within(positions.start)..within(positions.end) {
                let values = &page.values[p * (registers - 2) + column..][..N];
                let mut row = [s.splat(0.0); N];
                for n in 0..N {
                    row[n] = E::widen(s, &values[n]);
                }
                for q in 0..Q {
                    let weight = s.splat(weights[q][p]);
                    for n in 0..N {
                        sums[q][n] = s.mul_add(weight, row[n], sums[q][n]);
                    }
                }
            }
        }
        for q in 0..Q {
            for n in 0..N {
                s.store(sums[q][n], &mut states[at(q, n)]);
            }
        }
        N
    }
}
