//! Every operation in its plainest form: dense f32 weights, one loop per sum. The oracle of the fast forms; never the fast one itself.

use super::{Backend, CacheShape, Heads, Norm, Rope};
use crate::{batch::Batch, kv::BLOCK_TOKENS, weights::Weight};

/// The plain device.
#[derive(Debug, Default)]
pub struct Reference;

/// Dense weights, `[N, K]`.
#[derive(Debug)]
pub struct Dense {
    k: usize,
    values: Vec<f32>,
}

/// Activations, `[T, width]`.
#[derive(Debug, Clone)]
pub struct Rows {
    width: usize,
    values: Vec<f32>,
}

impl Rows {
    fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.width)
    }
}

/// Keys and values of each layer, `[slots, K * D]` each.
#[derive(Debug)]
pub struct Cache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    heads: Heads,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn norm(x: &[f32], norm: &Norm) -> Vec<f32> {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + norm.epsilon).sqrt();
    x.iter().zip(&norm.gains).map(|(x, g)| x * scale * g).collect()
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

impl Dense {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        self.values.chunks_exact(self.k).map(|row| dot(row, x)).collect()
    }
}

impl Backend for Reference {
    type Matrix = Dense;
    type Rows = Rows;
    type Cache = Cache;

    fn class(&self) -> String {
        "reference".into()
    }

    fn matrix(&self, parts: Vec<Weight>) -> Dense {
        let k = parts[0].cols();
        Dense { k, values: parts.iter().flat_map(Weight::dequantize).collect() }
    }

    fn rows(&self, _rows_max: usize, width: usize) -> Rows {
        Rows { width, values: Vec::new() }
    }

    fn cache(&self, shape: CacheShape) -> Cache {
        let layer = vec![0.0; shape.blocks * BLOCK_TOKENS * shape.heads.kv * shape.heads.dim];
        Cache { keys: vec![layer.clone(); shape.layers], values: vec![layer; shape.layers], heads: shape.heads }
    }

    fn block_bytes(shape: CacheShape) -> usize {
        shape.layers * BLOCK_TOKENS * shape.heads.kv * shape.heads.dim * 2 * size_of::<f32>()
    }

    fn embed(&mut self, table: &Dense, tokens: &[u32], out: &mut Rows) {
        out.values = tokens.iter().flat_map(|t| &table.values[*t as usize * table.k..][..table.k]).copied().collect();
    }

    fn norm_linear(&mut self, x: &Rows, gains: &Norm, w: &Dense, out: &mut Rows) {
        out.values = x.iter().flat_map(|row| w.apply(&norm(row, gains))).collect();
    }

    fn rope_write(&mut self, qkv: &mut Rows, rope: &Rope, batch: &Batch, layer: usize, cache: &mut Cache) {
        let Heads { query, kv, dim } = cache.heads;
        for (row, qkv) in qkv.values.chunks_exact_mut(qkv.width).enumerate() {
            let (rotated, value) = qkv.split_at_mut((query + kv) * dim);
            rotated.chunks_exact_mut(dim).for_each(|head| rope.rotate(head, batch.positions[row] as usize));
            let at = batch.slots[row] as usize * kv * dim;
            cache.keys[layer][at..at + kv * dim].copy_from_slice(&rotated[query * dim..]);
            cache.values[layer][at..at + kv * dim].copy_from_slice(value);
        }
    }

    fn attention(&mut self, qkv: &Rows, batch: &Batch, layer: usize, cache: &Cache, out: &mut Rows) {
        let Heads { query, kv, dim } = cache.heads;
        out.values = Vec::with_capacity(batch.tokens.len() * query * dim);
        for span in &batch.spans {
            let slot = |position: usize| {
                batch.blocks[span.blocks_at + position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
            };
            for row in 0..span.rows {
                let q = &qkv.values[(span.first_row + row) * qkv.width..];
                for head in 0..query {
                    let q = &q[head * dim..][..dim];
                    let at = |position: usize| (slot(position) * kv + head / (query / kv)) * dim;
                    let scores = (0..=span.start + row)
                        .map(|p| dot(q, &cache.keys[layer][at(p)..][..dim]) / (dim as f32).sqrt());
                    let scores: Vec<f32> = scores.collect();
                    let max = scores.iter().copied().fold(f32::MIN, f32::max);
                    let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                    let total: f32 = weights.iter().sum();
                    let mixed = (0..dim).map(|d| {
                        weights.iter().enumerate().map(|(p, w)| w * cache.values[layer][at(p) + d]).sum::<f32>()
                    });
                    out.values.extend(mixed.map(|v| v / total));
                }
            }
        }
    }

    fn linear_add(&mut self, x: &Rows, w: &Dense, residual: &mut Rows) {
        let added = x.iter().flat_map(|row| w.apply(row));
        residual.values.iter_mut().zip(added).for_each(|(r, a)| *r += a);
    }

    fn gated_linear_add(&mut self, gate_up: &Rows, w: &Dense, residual: &mut Rows) {
        let gated = gate_up.iter().flat_map(|row| {
            let (gate, up) = row.split_at(row.len() / 2);
            gate.iter().zip(up).map(|(g, u)| silu(*g) * u)
        });
        let gated = Rows { width: gate_up.width / 2, values: gated.collect() };
        self.linear_add(&gated, w, residual);
    }

    fn head(&mut self, x: &Rows, rows: &[u32], gains: &Norm, w: &Dense, logits: &mut Rows) {
        logits.values = rows
            .iter()
            .flat_map(|row| w.apply(&norm(&x.values[*row as usize * x.width..][..x.width], gains)))
            .collect();
    }

    fn normed(&mut self, x: &Rows, rows: &[u32], gains: &Norm, out: &mut Rows) {
        let row = |row: &u32| norm(&x.values[*row as usize * x.width..][..x.width], gains);
        out.values = rows.iter().flat_map(row).collect();
    }

    fn read<'a>(&self, rows: &'a Rows) -> &'a [f32] {
        &rows.values
    }
}
