//! Every operation in its plainest form: dense f32 weights, one loop per sum. The oracle of the fast forms; never the fast one itself.

use super::{Activation, Backend, CacheShape, Experts, HeadNorms, Heads, Norm, Rope, View};
use crate::{batch::Batch, kv::BLOCK_TOKENS, weights::Weight};

/// The plain device.
#[derive(Debug, Default)]
pub struct Reference;

/// Dense weights, `[N, K]`, and a bias, `[N]` or empty.
#[derive(Debug)]
pub struct Dense {
    k: usize,
    values: Vec<f32>,
    bias: Vec<f32>,
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

    fn row(&self, row: u32) -> &[f32] {
        &self.values[row as usize * self.width..][..self.width]
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

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f32::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
    }
}

/// `activation(gate) * up`
fn gated(activation: Activation, gate_up: &[f32]) -> Vec<f32> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(g, u)| activate(activation, *g) * u).collect()
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let max = scores.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f32 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

impl Dense {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let products = self.values.chunks_exact(self.k).map(|row| dot(row, x));
        if self.bias.is_empty() { products.collect() } else { products.zip(&self.bias).map(|(p, b)| p + b).collect() }
    }
}

impl Experts<Dense> {
    /// The experts that a row uses, with their weights, in the order of the experts.
    fn choose(&self, x: &[f32]) -> Vec<(usize, f32)> {
        let mut choice: Vec<(usize, f32)> = softmax(&self.router.apply(x)).into_iter().enumerate().collect();
        choice.sort_by(|a, b| b.1.total_cmp(&a.1));
        choice.truncate(self.used);
        let total: f32 = if self.is_normalized { choice.iter().map(|(_, p)| p).sum() } else { 1.0 };
        choice.iter_mut().for_each(|(_, p)| *p /= total);
        choice.sort_by_key(|(expert, _)| *expert);
        choice
    }

    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut sum = vec![0.0; x.len()];
        for (expert, weight) in self.choose(x) {
            let out = self.down[expert].apply(&gated(self.activation, &self.gate_up[expert].apply(x)));
            sum.iter_mut().zip(out).for_each(|(s, o)| *s += weight * o);
        }
        sum
    }
}

impl Backend for Reference {
    type Matrix = Dense;
    type Norm = Norm;
    type Rope = Rope;
    type Rows = Rows;
    type Cache = Cache;

    fn class(&self) -> String {
        "reference".into()
    }

    fn matrix(&self, parts: Vec<Weight>, bias: Vec<f32>) -> Dense {
        let k = parts[0].cols();
        Dense { k, values: parts.iter().flat_map(Weight::dequantize).collect(), bias }
    }

    fn norm(&self, norm: Norm) -> Norm {
        norm
    }

    fn rope(&self, rope: Rope) -> Rope {
        rope
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

    fn begin(&mut self, _: &Batch, _: &Cache) {}

    fn embed(&mut self, table: &Dense, batch: &Batch, scale: f32, out: &mut Rows) {
        let rows = batch.tokens.iter().flat_map(|t| &table.values[*t as usize * table.k..][..table.k]);
        out.values = rows.map(|x| x * scale).collect();
    }

    fn norm_linear(&mut self, x: &Rows, gains: &Norm, w: &Dense, out: &mut Rows) {
        out.values = x.iter().flat_map(|row| w.apply(&norm(row, gains))).collect();
    }

    fn rope_write(
        &mut self,
        qkv: &mut Rows,
        norms: Option<&HeadNorms<Norm>>,
        rope: &Rope,
        batch: &Batch,
        layer: usize,
        cache: &mut Cache,
    ) {
        let Heads { query, kv, dim } = cache.heads;
        for (row, qkv) in qkv.values.chunks_exact_mut(qkv.width).enumerate() {
            let (rotated, value) = qkv.split_at_mut((query + kv) * dim);
            for (i, head) in rotated.chunks_exact_mut(dim).enumerate() {
                if let Some(norms) = norms {
                    head.copy_from_slice(&norm(head, if i < query { &norms.query } else { &norms.key }));
                }
                rope.rotate(head, batch.positions[row] as usize);
            }
            let at = batch.slots[row] as usize * kv * dim;
            cache.keys[layer][at..at + kv * dim].copy_from_slice(&rotated[query * dim..]);
            cache.values[layer][at..at + kv * dim].copy_from_slice(value);
        }
    }

    fn attention(&mut self, qkv: &Rows, view: View, batch: &Batch, layer: usize, cache: &Cache, out: &mut Rows) {
        let Heads { query, kv, dim } = cache.heads;
        out.values = Vec::with_capacity(batch.tokens.len() * query * dim);
        for span in &batch.spans {
            let slot = |position: usize| {
                batch.blocks[span.blocks_at + position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
            };
            for row in 0..span.rows {
                let q = &qkv.values[(span.first_row + row) * qkv.width..];
                let seen = view.positions(span.start + row);
                for head in 0..query {
                    let q = &q[head * dim..][..dim];
                    let at = |position: usize| (slot(position) * kv + head / (query / kv)) * dim;
                    let scores = seen.clone().map(|p| dot(q, &cache.keys[layer][at(p)..][..dim]) * view.scale);
                    let weights = softmax(&scores.collect::<Vec<f32>>());
                    out.values.extend((0..dim).map(|d| {
                        seen.clone().zip(&weights).map(|(p, w)| w * cache.values[layer][at(p) + d]).sum::<f32>()
                    }));
                }
            }
        }
    }

    fn linear_add(&mut self, x: &Rows, w: &Dense, gains: Option<&Norm>, residual: &mut Rows) {
        let added = x.iter().flat_map(|row| {
            let out = w.apply(row);
            if let Some(gains) = gains { norm(&out, gains) } else { out }
        });
        residual.values.iter_mut().zip(added).for_each(|(r, a)| *r += a);
    }

    fn gated_linear_add(
        &mut self,
        gate_up: &Rows,
        activation: Activation,
        w: &Dense,
        gains: Option<&Norm>,
        residual: &mut Rows,
    ) {
        let values = gate_up.iter().flat_map(|row| gated(activation, row)).collect();
        self.linear_add(&Rows { width: gate_up.width / 2, values }, w, gains, residual);
    }

    fn experts_add(&mut self, gains: &Norm, experts: &Experts<Dense>, residual: &mut Rows) {
        for row in residual.values.chunks_exact_mut(residual.width) {
            let out = experts.apply(&norm(row, gains));
            row.iter_mut().zip(out).for_each(|(r, o)| *r += o);
        }
    }

    fn head(&mut self, x: &Rows, batch: &Batch, gains: &Norm, w: &Dense, logits: &mut Rows) {
        logits.values = batch.logit_rows.iter().flat_map(|row| w.apply(&norm(x.row(*row), gains))).collect();
    }

    fn hidden(&mut self, x: &Rows, batch: &Batch, gains: &Norm, out: &mut Rows) {
        out.values = batch.hidden_rows.iter().flat_map(|row| norm(x.row(*row), gains)).collect();
    }

    fn read<'a>(&self, rows: &'a mut Rows) -> &'a [f32] {
        &rows.values
    }
}
