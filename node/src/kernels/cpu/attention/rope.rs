//! Norm and rotation of queries and keys, and the way of keys and values into the cache: a row at a time, on all threads.

use half::{bf16, f16};

use super::cache::{Cache, Element, Slots};
use crate::{
    batch::Batch,
    kernels::{
        HeadNorms, Heads, KvDtype, Norm, Rope,
        cpu::{
            Rows, Shared,
            isa::{Isa, for_each_isa},
            pool::Pool,
            rowwise,
        },
    },
};

/// Rows that a thread takes at a time: those of a block mostly, so that two threads seldom write to one line of memory.
const ROWS_A_TURN: usize = 8;

for_each_isa! {
    /// Rotates neighbours (`2i`, `2i+1`) of heads `[n, D]`.
    fn rotate_neighbours(heads: &mut [f32], dim: usize, cos: &[f32], sin: &[f32]) {
        for head in heads.chunks_exact_mut(dim) {
            let (pairs, _) = head.as_chunks_mut::<2>();
            for ((pair, cos), sin) in pairs.iter_mut().zip(cos).zip(sin) {
                let [x, y] = *pair;
                *pair = [x * cos - y * sin, x * sin + y * cos];
            }
        }
    }
}

for_each_isa! {
    /// Rotates halves (`i`, `i + half`) of heads `[n, D]`.
    fn rotate_halves(heads: &mut [f32], dim: usize, cos: &[f32], sin: &[f32]) {
        for head in heads.chunks_exact_mut(dim) {
            let (left, right) = head.split_at_mut(cos.len());
            for (((x, y), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
            }
        }
    }
}

/// Norms and rotates queries and keys of `qkv[T, (H+2K)*D]` in place, and writes keys and values to their slots.
#[allow(clippy::too_many_arguments)]
pub(in crate::kernels::cpu) fn rope_write(
    isa: Isa,
    pool: &mut Pool,
    qkv: &mut Rows,
    norms: Option<&HeadNorms<Norm>>,
    rope: &Rope,
    batch: &Batch,
    layer: usize,
    cache: &mut Cache,
) {
    let writer = Writer { isa, norms, rope, batch, heads: cache.heads() };
    match cache.dtype() {
        KvDtype::F16 => writer.run(pool, qkv, cache.slots::<f16>(layer)),
        KvDtype::Bf16 => writer.run(pool, qkv, cache.slots::<bf16>(layer)),
        KvDtype::Int8 => writer.run(pool, qkv, cache.slots::<i8>(layer)),
    }
}

struct Writer<'a> {
    isa: Isa,
    norms: Option<&'a HeadNorms<Norm>>,
    rope: &'a Rope,
    batch: &'a Batch,
    heads: Heads,
}

impl Writer<'_> {
    fn run<E: Element>(&self, pool: &mut Pool, qkv: &mut Rows, slots: Slots<'_, E>) {
        let (width, rows) = (qkv.width, Shared(qkv.values.as_mut_ptr()));
        pool.for_each(qkv.count(), ROWS_A_TURN, |range| {
            // a whole `Shared` moves into the closure, not its pointer
            let rows = &rows;
            for row in range {
                // SAFETY: each row is one thread's
                let qkv = unsafe { rows.slice(row * width, width) };
                let (keys, values) = self.rotate(qkv, self.batch.positions[row] as usize);
                // SAFETY: each row has a slot of its own
                unsafe { slots.write(self.isa, self.batch.slots[row] as usize, keys, values) };
            }
        });
    }

    /// Norms and rotates one row; gives its keys and values, `[K, D]` each.
    fn rotate<'a>(&self, qkv: &'a mut [f32], position: usize) -> (&'a [f32], &'a [f32]) {
        let Self { isa, rope, heads: Heads { query, kv, dim }, .. } = *self;
        let (rotated, values) = qkv.split_at_mut((query + kv) * dim);
        if let Some(HeadNorms { query: of_queries, key: of_keys }) = self.norms {
            for (h, head) in rotated.chunks_exact_mut(dim).enumerate() {
                let norm = if h < query { of_queries } else { of_keys };
                rowwise::rms_norm_in_place(isa, head, &norm.gains, norm.epsilon);
            }
        }
        let angles = position * rope.half..(position + 1) * rope.half;
        let (cos, sin) = (&rope.cos[angles.clone()], &rope.sin[angles]);
        match rope.interleaved {
            true => rotate_neighbours(isa, rotated, dim, cos, sin),
            false => rotate_halves(isa, rotated, dim, cos, sin),
        }
        (&rotated[query * dim..], values)
    }
}
