//! Which block of threads takes which rows and tokens of a step's attention. Pure.

use crate::{batch::Batch, kv::BLOCK_TOKENS};

/// Columns of a block of threads that shares few; more of them go by [`Work::many`].
pub(super) const FEW_COLUMNS: usize = 8;

/// Blocks of tokens that one block of threads goes through for few columns: a multiple of its warps. A sequence is always cut at the
/// same places, whatever stands beside it.
const PART_BLOCKS: usize = 32;

/// Some query heads of some rows of one sequence over some of its blocks: `Item` in `attention.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Item {
    /// First row of the sequence in the step, and its position.
    pub(super) row: i32,
    pub(super) position: i32,
    /// Columns count through the rows and, within a row, through the query heads of one key-value head.
    pub(super) first_column: i32,
    pub(super) columns: i32,
    /// Where the sequence's block table begins.
    pub(super) table: i32,
    pub(super) first_block: i32,
    pub(super) end_block: i32,
    /// Where the unfinished sums go; less than 0: they are finished.
    pub(super) part: i32,
}

/// Parts of the same columns: `Whole` in `attention.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Whole {
    pub(super) row: i32,
    pub(super) first_column: i32,
    pub(super) columns: i32,
    pub(super) first_part: i32,
    pub(super) parts: i32,
}

/// A step's work.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Up to [`FEW_COLUMNS`] columns each.
    pub(super) few: Vec<Item>,
    /// Up to as many columns each as the kernel takes.
    pub(super) many: Vec<Item>,
    pub(super) wholes: Vec<Whole>,
    /// Parts of all wholes.
    pub(super) parts: usize,
}

impl Work {
    /// Lays out a step for `group` query heads to a key-value head. The kernel for many columns takes `many_columns`; without one, every
    /// row goes by the other, whose sums are made in one order however the rows are cut into steps.
    pub(super) fn fill(&mut self, batch: &Batch, group: usize, many_columns: Option<usize>) {
        self.few.clear();
        self.many.clear();
        self.wholes.clear();
        self.parts = 0;
        for span in &batch.spans {
            let columns = span.rows * group;
            // a few guessed tokens are still few columns
            let many = many_columns.filter(|_| columns > 2 * FEW_COLUMNS.max(group));
            let chunk = many.unwrap_or(FEW_COLUMNS);
            for first in (0..columns).step_by(chunk) {
                let count = chunk.min(columns - first);
                let last_row = (first + count - 1) / group;
                let item = Item {
                    row: span.first_row as i32,
                    position: span.start as i32,
                    first_column: first as i32,
                    columns: count as i32,
                    table: span.blocks_at as i32,
                    first_block: 0,
                    end_block: (span.start + last_row + 1).div_ceil(BLOCK_TOKENS) as i32,
                    part: -1,
                };
                if many.is_some() { self.many.push(item) } else { self.split(item) }
            }
        }
    }

    fn split(&mut self, item: Item) {
        let blocks = item.end_block as usize;
        if blocks <= PART_BLOCKS {
            return self.few.push(item);
        }
        let parts = blocks.div_ceil(PART_BLOCKS);
        let Item { row, first_column, columns, .. } = item;
        self.wholes.push(Whole { row, first_column, columns, first_part: self.parts as i32, parts: parts as i32 });
        for i in 0..parts {
            let (first, end) = (i * PART_BLOCKS, blocks.min((i + 1) * PART_BLOCKS));
            let part = (self.parts + i) as i32;
            self.few.push(Item { first_block: first as i32, end_block: end as i32, part, ..item });
        }
        self.parts += parts;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Law: every query head of every row meets every token before it once, and no block of threads gets more columns than it takes.
        #[test]
        fn every_column_meets_every_block_once(
            spans in prop::collection::vec((1usize..40, 0usize..2000), 1..5),
            group in 1usize..17,
            many in prop_oneof![Just(None), Just(Some(64usize)), Just(Some(128))],
        ) {
            let mut batch = Batch::default();
            for (rows, start) in &spans {
                batch.push(&vec![0; *rows], *start, &vec![0; (start + rows).div_ceil(BLOCK_TOKENS)]);
            }
            let mut work = Work::default();
            work.fill(&batch, group, many);
            let mut met: HashMap<(i32, i32), Vec<i32>> = HashMap::new();
            for (items, most) in [(&work.few, FEW_COLUMNS), (&work.many, many.unwrap_or(0))] {
                for item in items {
                    prop_assert!(item.columns as usize <= most && item.columns > 0);
                    for column in item.first_column..item.first_column + item.columns {
                        met.entry((item.row, column)).or_default().extend(item.first_block..item.end_block);
                    }
                }
            }
            for span in &batch.spans {
                for column in 0..span.rows * group {
                    let position = span.start + column / group;
                    let mut blocks = met.remove(&(span.first_row as i32, column as i32)).unwrap();
                    blocks.sort_unstable();
                    prop_assert!(blocks.windows(2).all(|pair| pair[0] + 1 == pair[1]) && blocks[0] == 0);
                    prop_assert!(*blocks.last().unwrap() as usize >= position / BLOCK_TOKENS);
                }
            }
            prop_assert!(met.is_empty());
            let of_wholes: i32 = work.wholes.iter().map(|whole| whole.parts).sum();
            prop_assert_eq!(of_wholes as usize, work.parts);
            prop_assert_eq!(work.few.iter().filter(|item| item.part >= 0).count(), work.parts);
        }
    }
}
