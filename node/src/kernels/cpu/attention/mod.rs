//! Attention over paged keys and values: a tile of one sequence's rows reads each block once, for all query heads that share it.
//!
//! A row's result is the same bits whatever tile it is in and on however many threads: see [`sweep`] and [`sweep::PARTITION`].

mod cache;
mod rope;
mod sweep;

use std::{cell::RefCell, ops::Range};

use half::{bf16, f16};

use self::{
    cache::Element,
    sweep::{Finish, Merge, PARTITION, State, Sweep},
};
use super::{
    Rows, Shared,
    isa::Isa,
    pool::Pool,
    simd::{self, LANES},
};
use crate::{
    batch::Batch,
    kernels::{Heads, KvDtype, View},
};

pub(crate) use cache::Cache;
pub(super) use rope::rope_write;

/// Rows of a tile; with any number of heads a multiple of the queries that are swept together.
const TILE_ROWS: usize = 16;

/// Items of work for each thread below which long contexts are cut.
const ITEMS_A_THREAD: usize = 4;

/// One step's work, and memory for it that is kept from step to step.
#[derive(Debug, Default)]
pub(super) struct Work {
    items: Vec<Item>,
    /// What is put together in the end.
    merges: Vec<Merger>,
    /// States of partitions that were computed on their own.
    states: Vec<[f32; LANES]>,
}

/// Rows of one sequence.
#[derive(Debug, Clone, Copy)]
struct Tile {
    /// In the batch.
    first_row: usize,
    rows: usize,
    /// Position of its first row.
    start: usize,
    blocks_at: usize,
    kv_head: usize,
}

/// One thread's work.
#[derive(Debug, Clone)]
struct Item {
    tile: Tile,
    /// All that the tile sees, or one of them.
    partitions: Range<usize>,
    /// Where its states go in [`Work::states`]; without it, the rows are finished.
    states_at: Option<usize>,
}

/// A tile whose partitions were computed one by one.
#[derive(Debug, Clone)]
struct Merger {
    tile: Tile,
    partitions: usize,
    states_at: usize,
}

impl Tile {
    /// Positions that row `i` sees.
    fn seen(&self, i: usize, view: View) -> Range<usize> {
        view.positions(self.start + i)
    }

    /// Partitions that any row sees.
    fn partitions(&self, view: View) -> Range<usize> {
        self.seen(0, view).start / PARTITION..self.seen(self.rows - 1, view).end.div_ceil(PARTITION)
    }
}

impl Work {
    /// Cuts the batch into items; long contexts too where there would be too few for `threads`.
    fn plan(&mut self, batch: &Batch, heads: Heads, view: View, threads: usize) {
        self.items.clear();
        self.merges.clear();
        let tiles = batch.spans.iter().map(|span| span.rows.div_ceil(TILE_ROWS)).sum::<usize>();
        let is_cut = tiles * heads.kv < ITEMS_A_THREAD * threads && threads > 1;
        let mut states = 0;
        for span in &batch.spans {
            // the last first: they see most
            for first in (0..span.rows).step_by(TILE_ROWS).rev() {
                let rows = TILE_ROWS.min(span.rows - first);
                for kv_head in 0..heads.kv {
                    let (first_row, start) = (span.first_row + first, span.start + first);
                    let tile = Tile { first_row, rows, start, blocks_at: span.blocks_at, kv_head };
                    states = self.push(tile, tile.partitions(view), is_cut, states, registers(heads) * rows);
                }
            }
        }
        self.states.resize(states, [0.0; LANES]);
    }

    /// Returns where the next states go.
    fn push(&mut self, tile: Tile, partitions: Range<usize>, is_cut: bool, at: usize, registers: usize) -> usize {
        if !is_cut || partitions.len() < 2 {
            self.items.push(Item { tile, partitions, states_at: None });
            return at;
        }
        self.merges.push(Merger { tile, partitions: partitions.len(), states_at: at });
        let end = at + partitions.len() * registers;
        let places = (at..end).step_by(registers);
        self.items.extend(partitions.zip(places).map(|(p, at)| Item {
            tile,
            partitions: p..p + 1,
            states_at: Some(at),
        }));
        end
    }
}

/// Registers of the states of all queries of a row that share keys.
fn registers(heads: Heads) -> usize {
    heads.query / heads.kv * State::registers(heads.dim)
}

/// `out[T, H * D]`: each row's queries over the keys of its sequence that it sees.
#[allow(clippy::too_many_arguments)]
pub(super) fn attend(
    isa: Isa,
    pool: &mut Pool,
    work: &mut Work,
    qkv: &Rows,
    view: View,
    batch: &Batch,
    layer: usize,
    cache: &Cache,
    out: &mut Rows,
) {
    let heads = cache.heads();
    out.resize(qkv.count(), heads.query_width());
    work.plan(batch, heads, view, pool.threads());
    let Work { items, merges, states } = work;
    let (out, states) = (Shared(out.values.as_mut_ptr()), Shared(states.as_mut_ptr().cast()));
    let device = Device { isa, cache, layer, view, blocks: &batch.blocks, qkv, out, states };
    pool.for_each(items.len(), 1, |range| items[range].iter().for_each(|item| device.run(item)));
    pool.for_each(merges.len(), 1, |range| merges[range].iter().for_each(|merger| device.merge(merger)));
}

/// What every item reads, and where it writes.
struct Device<'a> {
    isa: Isa,
    cache: &'a Cache,
    layer: usize,
    view: View,
    blocks: &'a [u32],
    qkv: &'a Rows,
    /// `[T, H * D]`
    out: Shared,
    states: Shared,
}

/// One thread's buffers.
#[derive(Debug, Default)]
struct Scratch {
    /// The tile's queries: `[D, Q]` for each group of `Q` that is swept together.
    queries: Vec<f32>,
    /// A state for each query of the tile.
    totals: Vec<[f32; LANES]>,
    /// States of the queries that are swept together.
    swept: Vec<[f32; LANES]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Device<'_> {
    fn run(&self, item: &Item) {
        SCRATCH.with_borrow_mut(|scratch| match self.cache.dtype() {
            KvDtype::F16 => self.run_as::<f16>(item, scratch),
            KvDtype::Bf16 => self.run_as::<bf16>(item, scratch),
            KvDtype::Int8 => self.run_as::<i8>(item, scratch),
        });
    }

    fn run_as<E: Element>(&self, Item { tile, partitions, states_at }: &Item, scratch: &mut Scratch) {
        let Heads { query, kv, dim } = self.cache.heads();
        let (queries, registers) = (tile.rows * query / kv, State::registers(dim));
        let Scratch { queries: packed, totals, swept } = scratch;
        self.pack(tile, packed);
        totals.resize(queries * registers, [0.0; LANES]);
        totals.chunks_exact_mut(registers).for_each(State::clear);
        for partition in partitions.clone() {
            for group in self.groups(queries) {
                swept.resize(group.len() * registers, [0.0; LANES]);
                self.sweep::<E>(tile, partition, group.clone(), packed, swept);
                let totals = totals[group.start * registers..].chunks_exact_mut(registers);
                for (earlier, later) in totals.zip(swept.chunks_exact(registers)) {
                    simd::run(self.isa, Merge { earlier, later });
                }
            }
        }
        match states_at {
            // SAFETY: each item has states of its own
            Some(at) => {
                unsafe { self.states.slice(at * LANES, totals.len() * LANES) }.copy_from_slice(totals.as_flattened())
            }
            None => self.finish(tile, totals),
        }
    }

    /// Groups of queries that are swept together: as many as their sums fit the registers.
    fn groups(&self, queries: usize) -> impl Iterator<Item = Range<usize>> {
        let has_many_registers = self.isa.has_many_registers();
        let mut start = 0;
        std::iter::from_fn(move || {
            let count = match queries - start {
                0 => return None,
                8.. if has_many_registers => 8,
                left => left.min(4),
            };
            start += count;
            Some(start - count..start)
        })
    }

    /// The tile's queries with the factor of the scores, as they are swept.
    fn pack(&self, tile: &Tile, packed: &mut Vec<f32>) {
        let Heads { query, kv, dim } = self.cache.heads();
        let per_row = query / kv;
        packed.resize(tile.rows * per_row * dim, 0.0);
        for group in self.groups(tile.rows * per_row) {
            for i in group.clone() {
                let head = tile.kv_head * per_row + i % per_row;
                let query = &self.qkv.row(tile.first_row + i / per_row)[head * dim..][..dim];
                let packed = packed[group.start * dim + i - group.start..].iter_mut().step_by(group.len());
                packed.zip(query).for_each(|(packed, x)| *packed = x * self.view.scale);
            }
        }
    }

    fn sweep<E: Element>(
        &self,
        tile: &Tile,
        partition: usize,
        group: Range<usize>,
        packed: &[f32],
        states: &mut [[f32; LANES]],
    ) {
        match group.len() {
            8 => self.sweep_queries::<E, 8>(tile, partition, group.start, packed, states),
            4 => self.sweep_queries::<E, 4>(tile, partition, group.start, packed, states),
            3 => self.sweep_queries::<E, 3>(tile, partition, group.start, packed, states),
            2 => self.sweep_queries::<E, 2>(tile, partition, group.start, packed, states),
            _ => self.sweep_queries::<E, 1>(tile, partition, group.start, packed, states),
        }
    }

    fn sweep_queries<E: Element, const Q: usize>(
        &self,
        tile: &Tile,
        partition: usize,
        first: usize,
        packed: &[f32],
        states: &mut [[f32; LANES]],
    ) {
        let Heads { query, kv, dim } = self.cache.heads();
        let within = |p: usize| p.clamp(partition * PARTITION, (partition + 1) * PARTITION);
        let seen: [_; Q] = std::array::from_fn(|q| {
            let seen = tile.seen((first + q) / (query / kv), self.view);
            within(seen.start)..within(seen.end)
        });
        let (queries, _) = packed[first * dim..][..Q * dim].as_chunks();
        let pages = self.cache.pages::<E>(self.layer, tile.kv_head);
        let blocks = &self.blocks[tile.blocks_at..];
        simd::run(self.isa, Sweep { pages, blocks, seen, queries, states });
    }

    /// Puts the partitions of a tile together, in their order.
    fn merge(&self, Merger { tile, partitions, states_at }: &Merger) {
        let heads = self.cache.heads();
        let len = tile.rows * registers(heads);
        // SAFETY: each tile has states of its own, and all who wrote them are done
        let states = unsafe { self.states.slice(states_at * LANES, partitions * len * LANES) };
        let (states, _) = states.as_chunks_mut();
        let (totals, rest) = states.split_at_mut(len);
        let registers = State::registers(heads.dim);
        for later in rest.chunks_exact(len) {
            for (earlier, later) in totals.chunks_exact_mut(registers).zip(later.chunks_exact(registers)) {
                simd::run(self.isa, Merge { earlier, later });
            }
        }
        self.finish(tile, totals);
    }

    fn finish(&self, tile: &Tile, totals: &mut [[f32; LANES]]) {
        let heads = self.cache.heads();
        let per_row = heads.query / heads.kv;
        for (i, state) in totals.chunks_exact_mut(State::registers(heads.dim)).enumerate() {
            let (row, head) = (tile.first_row + i / per_row, tile.kv_head * per_row + i % per_row);
            // SAFETY: each tile has rows and heads of its own
            let out = unsafe { self.out.slice(row * heads.query_width() + head * heads.dim, heads.dim) };
            simd::run(self.isa, Finish { state, out });
        }
    }
}

#[cfg(test)]
mod tests;
