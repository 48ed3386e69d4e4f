//! The form on NVIDIA GPUs: our kernels (`cu/`), by the driver's interface.
//!
//! Activations stay f32 along the residual and go through the tensor cores as bf16; keys and values lie in blocks as the scheduler deals
//! them out. In tests the same kernels run on a CPU (the `emulator` crate), held against the reference.

mod device;
#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(test)]
pub(crate) mod emulated;
mod items;
mod matrix;

use std::{ffi::CStr, sync::Arc};

use half::{bf16, f16};

pub use self::device::Device;
use self::{
    device::{Buffer, THREADS, launch},
    items::{FEW_COLUMNS, Item, Whole, Work},
    matrix::{Inputs, Matrix},
};
use super::{Activation, Backend, CacheShape, Experts, HeadNorms, Heads, KvDtype, Norm, Rope, View};
use crate::{
    batch::{Batch, Pick},
    kv::BLOCK_TOKENS,
    weights::Weight,
};

/// Warps of a block of attention, and threads of them.
const ATTENTION_WARPS: usize = 4;
const ATTENTION_THREADS: u32 = 128;

/// Threads of a block that chooses a token.
const PICK_THREADS: u32 = 512;

/// What the inputs of every matrix must be a multiple of.
pub const INPUTS_MULTIPLE: usize = matrix::GROUP;

/// The widest head that the kernels take.
pub const HEAD_MAX: usize = 256;

/// A GPU.
pub struct Cuda<D: Device> {
    device: Arc<D>,
    is_invariant: bool,
    step: Step<D>,
    inputs: Inputs<D>,
    /// What a product gives before it is normed or weighed, `[T, N]`.
    product: Buffer<D, f32>,
    picked: Picked<D>,
    /// Rotated queries, `[T, H, padded D]` of 16 bits.
    queries: Buffer<D, u16>,
    mixture: Mixture<D>,
}

/// A step's input on the device.
struct Step<D: Device> {
    work: Work,
    words: Vec<u32>,
    /// All that follows, one after another.
    buffer: Buffer<D, u32>,
    tokens: u64,
    positions: u64,
    slots: u64,
    tables: u64,
    logit_rows: u64,
    hidden_rows: u64,
    few: u64,
    many: u64,
    wholes: u64,
    /// Unfinished sums of attention, and what they are worth.
    part_sums: Buffer<D, f32>,
    part_totals: Buffer<D, f32>,
}

/// Tokens that the device chooses.
struct Picked<D: Device> {
    picks: Buffer<D, u32>,
    /// Which of the logits' rows they belong to.
    rows: Buffer<D, u32>,
    tokens: Buffer<D, u32>,
    host: Vec<u32>,
}

/// Buffers of a mixture of experts.
struct Mixture<D: Device> {
    scores: Buffer<D, f32>,
    /// `[T, experts]`, zero where an expert is not used.
    weights: Buffer<D, f32>,
    /// The normed rows of the step, `[T, E]`.
    normed: Buffer<D, bf16>,
    /// `[T, 2F]`
    gate_up: Buffer<D, f32>,
}

/// Activations, `[T, width]`, f32 but for what attention gives.
pub struct Rows<D: Device> {
    width: usize,
    count: usize,
    values: Buffer<D, f32>,
    /// What attention gives.
    halves: Buffer<D, bf16>,
    is_half: bool,
    host: Vec<f32>,
}

/// Gains on the device.
pub struct DeviceNorm<D: Device> {
    gains: Buffer<D, f32>,
    epsilon: f32,
}

/// Angles on the device.
pub struct DeviceRope<D: Device> {
    cos: Buffer<D, f32>,
    sin: Buffer<D, f32>,
    half: usize,
    interleaved: bool,
}

/// Keys and values in blocks, laid out as `attention.cuh` says.
pub struct Cache<D: Device> {
    shape: CacheShape,
    /// `[layers, blocks, K, 16, padded D]`
    keys: Buffer<D, u8>,
    /// `[layers, blocks, K, padded D, 16]`
    values: Buffer<D, u8>,
    /// `[layers, blocks, K, 16]`, of int8 alone.
    key_scales: Buffer<D, f32>,
    value_scales: Buffer<D, f32>,
}

/// `Shape` in `attention.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionShape {
    kv_heads: i32,
    group: i32,
    width: i32,
    scale: f32,
    window: i32,
}

/// How wide a head is kept.
fn padded(dim: usize) -> usize {
    let wide = [32, 64, 96, 128, HEAD_MAX].into_iter().find(|padded| dim <= *padded);
    wide.unwrap_or_else(|| panic!("heads of {dim} values are wider than the {HEAD_MAX} that the GPU's attention takes"))
}

/// Columns that a block of threads takes of a prompt.
fn many_columns(padded: usize) -> usize {
    ATTENTION_WARPS * if padded == HEAD_MAX { 16 } else { 32 }
}

/// Bytes of shared memory that attention needs, as `attend` lays it out.
fn attention_shared(padded: usize, is_few: bool) -> u32 {
    let (count, parts) = if is_few { (FEW_COLUMNS, ATTENTION_WARPS) } else { (many_columns(padded), 1) };
    let own = if is_few { FEW_COLUMNS } else { count / ATTENTION_WARPS };
    let room = (2 * count * (padded + 8)).max(4 * parts * count * padded);
    (room + 8 * parts * count + 8 * count + 2 * ATTENTION_WARPS * own * BLOCK_TOKENS) as u32
}

fn attend(is_few: bool, dtype: KvDtype, padded: usize) -> &'static CStr {
    macro_rules! names {
        ($($padded:literal $depth:literal)*) => {
            match (is_few, dtype, padded) {
                $(
                    (true, KvDtype::F16, $padded) => name!("attend_few_f16_", $depth),
                    (true, KvDtype::Bf16, $padded) => name!("attend_few_bf16_", $depth),
                    (true, KvDtype::Int8, $padded) => name!("attend_few_int8_", $depth),
                    (false, KvDtype::F16, $padded) => name!("attend_many_f16_", $depth),
                    (false, KvDtype::Bf16, $padded) => name!("attend_many_bf16_", $depth),
                    (false, KvDtype::Int8, $padded) => name!("attend_many_int8_", $depth),
                )*
                _ => unreachable!("heads are padded to these widths"),
            }
        };
    }
    macro_rules! name {
        ($start:literal, $depth:literal) => {
            const { CStr::from_bytes_with_nul(concat!($start, $depth, "\0").as_bytes()) }.expect("one zero, at the end")
        };
    }
    names!(32 2 64 4 96 6 128 8 256 16)
}

impl<D: Device> Rows<D> {
    fn reserve(&mut self, count: usize, width: usize) {
        (self.count, self.width, self.is_half) = (count, width, false);
        self.values.reserve(count * width);
    }
}

impl<D: Device> Step<D> {
    fn new(device: &Arc<D>) -> Self {
        let buffer = Buffer::new(device, 0);
        Self {
            work: Work::default(),
            words: Vec::new(),
            buffer,
            tokens: 0,
            positions: 0,
            slots: 0,
            tables: 0,
            logit_rows: 0,
            hidden_rows: 0,
            few: 0,
            many: 0,
            wholes: 0,
            part_sums: Buffer::new(device, 0),
            part_totals: Buffer::new(device, 0),
        }
    }

    /// Copies the step's input in one piece.
    fn fill(&mut self, batch: &Batch, heads: Heads, is_invariant: bool) {
        let (group, padded) = (heads.query / heads.kv, padded(heads.dim));
        self.work.fill(batch, group, (!is_invariant).then(|| many_columns(padded)));
        let columns = self.work.parts * heads.kv * FEW_COLUMNS;
        self.part_sums.reserve(columns * padded);
        self.part_totals.reserve(2 * columns);
        self.words.clear();
        let Work { few, many, wholes, .. } = &self.work;
        let lists: [&[u32]; 9] = [
            &batch.tokens,
            &batch.positions,
            &batch.slots,
            &batch.blocks,
            &batch.logit_rows,
            &batch.hidden_rows,
            words(few),
            words(many),
            words(wholes),
        ];
        let mut offsets = [0; 9];
        for (offset, list) in offsets.iter_mut().zip(lists) {
            *offset = self.words.len();
            self.words.extend_from_slice(list);
        }
        self.buffer.write(&self.words);
        let at = offsets.map(|offset| self.buffer.at_value(offset));
        [
            self.tokens,
            self.positions,
            self.slots,
            self.tables,
            self.logit_rows,
            self.hidden_rows,
            self.few,
            self.many,
            self.wholes,
        ] = at;
    }
}

/// Items as the words that they are made of.
fn words<T: Words>(items: &[T]) -> &[u32] {
    // SAFETY: items are nothing but words
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), size_of_val(items) / size_of::<u32>()) }
}

/// Structures of words of 32 bits.
trait Words: Copy {}
impl Words for Item {}
impl Words for Whole {}
impl Words for Pick {}

impl<D: Device> Cache<D> {
    fn new(device: &Arc<D>, shape: CacheShape) -> Self {
        let tokens = shape.layers * shape.blocks * shape.heads.kv * BLOCK_TOKENS;
        let bytes = tokens * padded(shape.heads.dim) * value_bytes(shape.dtype);
        let scales = if shape.dtype == KvDtype::Int8 { tokens } else { 0 };
        Self {
            shape,
            // what pads a head must be zero, and what nobody wrote yet a number
            keys: Buffer::zeros(device, bytes),
            values: Buffer::zeros(device, bytes),
            key_scales: Buffer::zeros(device, scales),
            value_scales: Buffer::zeros(device, scales),
        }
    }

    /// Keys, values and their scales of a layer.
    fn layer(&self, layer: usize) -> [u64; 4] {
        let CacheShape { blocks, heads, dtype, .. } = self.shape;
        let tokens = layer * blocks * heads.kv * BLOCK_TOKENS;
        let bytes = tokens * padded(heads.dim) * value_bytes(dtype);
        let scales = if dtype == KvDtype::Int8 { tokens } else { 0 };
        [
            self.keys.at_value(bytes),
            self.values.at_value(bytes),
            self.key_scales.at_value(scales),
            self.value_scales.at_value(scales),
        ]
    }
}

fn value_bytes(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::F16 => size_of::<f16>(),
        KvDtype::Bf16 => size_of::<bf16>(),
        KvDtype::Int8 => 1,
    }
}

impl<D: Device> Cuda<D> {
    /// All operations on one device. When `is_invariant`, a row's bits do not depend on the rows beside it, nor on how its sequence is cut
    /// into steps; prompts are slower then.
    pub fn new(device: Arc<D>, is_invariant: bool) -> Self {
        let mixture = Mixture {
            scores: Buffer::new(&device, 0),
            weights: Buffer::new(&device, 0),
            normed: Buffer::new(&device, 0),
            gate_up: Buffer::new(&device, 0),
        };
        Self {
            step: Step::new(&device),
            inputs: Inputs::new(&device, is_invariant),
            product: Buffer::new(&device, 0),
            picked: Picked {
                picks: Buffer::new(&device, 0),
                rows: Buffer::new(&device, 0),
                tokens: Buffer::new(&device, 0),
                host: Vec::new(),
            },
            queries: Buffer::new(&device, 0),
            mixture,
            is_invariant,
            device,
        }
    }

    /// `inputs = norm(x[picked])`, where `picked` are rows on the device, or 0 for all.
    fn norm_inputs(&mut self, x: &Rows<D>, picked: u64, count: usize, norm: &DeviceNorm<D>) {
        self.inputs.rows.reserve(count * x.width);
        if count > 0 {
            // SAFETY: `x` has the picked rows, and the inputs have room for them
            unsafe {
                launch!(self.device, c"rms_norm_bf16", [count as u32, 1], THREADS, 0;
                    x.values.at(), picked, norm.gains.at(), norm.epsilon, x.width as i32, self.inputs.rows.at());
            }
        }
    }

    /// `residual += norm(inputs @ W^T)`; without a norm, the product itself. `x` are rows elsewhere than in the inputs.
    fn multiply_add(&mut self, x: Option<u64>, w: &Matrix<D>, norm: Option<&DeviceNorm<D>>, residual: &mut Rows<D>) {
        let (x, count) = (x.unwrap_or(self.inputs.rows.at()), residual.count);
        let Some(norm) = norm else { return self.inputs.multiply_rows(x, w, count, &residual.values, true) };
        self.product.reserve(count * w.outputs);
        self.inputs.multiply_rows(x, w, count, &self.product, false);
        if count > 0 {
            // SAFETY: the product is as large as the residual
            unsafe {
                launch!(self.device, c"rms_norm_add", [count as u32, 1], THREADS, 0;
                    self.product.at(), norm.gains.at(), norm.epsilon, residual.width as i32, residual.values.at());
            }
        }
    }

    /// `inputs = activation(gate) * up` of rows that stand side by side.
    fn gate_inputs(&mut self, gate_up: u64, count: usize, width: usize, activation: Activation) {
        self.inputs.rows.reserve(count * width);
        let is_gelu = i32::from(activation == Activation::GeluTanh);
        // SAFETY: there are `count` rows of `2 * width`, and the inputs have room for half of each
        unsafe {
            launch!(self.device, c"gate_mul", [count as u32, 1], THREADS, 0;
                gate_up, width as i32, is_gelu, self.inputs.rows.at());
        }
    }

    fn attend(&self, is_few: bool, view: View, layer: usize, cache: &Cache<D>, out: u64) {
        let Heads { query, kv, dim } = cache.shape.heads;
        let (step, padded) = (&self.step, padded(dim));
        let (items, count) = if is_few { (step.few, step.work.few.len()) } else { (step.many, step.work.many.len()) };
        if count == 0 {
            return;
        }
        let shape = AttentionShape {
            kv_heads: kv as i32,
            group: (query / kv) as i32,
            width: dim as i32,
            scale: view.scale,
            window: view.window.map_or(0, |window| i32::try_from(window).unwrap_or(0)),
        };
        let [keys, values, key_scales, value_scales] = cache.layer(layer);
        let (sums, totals) = (step.part_sums.at(), step.part_totals.at());
        // SAFETY: the items name rows, blocks and parts that are there
        unsafe {
            launch!(self.device, attend(is_few, cache.shape.dtype, padded), [count as u32, kv as u32], ATTENTION_THREADS,
                attention_shared(padded, is_few); self.queries.at(), keys, values, key_scales, value_scales, items,
                step.tables, shape, out, sums, totals);
            if is_few && !step.work.wholes.is_empty() {
                launch!(self.device, c"attend_join", [step.work.wholes.len() as u32, kv as u32], THREADS, 0;
                    step.wholes, sums, totals, FEW_COLUMNS as i32, padded as i32, shape, out);
            }
        }
    }
}

impl<D: Device> Backend for Cuda<D> {
    type Matrix = Matrix<D>;
    type Norm = DeviceNorm<D>;
    type Rope = DeviceRope<D>;
    type Rows = Rows<D>;
    type Cache = Cache<D>;

    fn class(&self) -> String {
        let class = self.device.class();
        if self.is_invariant { class + "-invariant" } else { class }
    }

    fn matrix(&self, parts: Vec<Weight>, bias: Vec<f32>) -> Matrix<D> {
        Matrix::new(&self.device, &parts, &bias)
    }

    fn norm(&self, norm: Norm) -> DeviceNorm<D> {
        DeviceNorm { gains: Buffer::of(&self.device, &norm.gains), epsilon: norm.epsilon }
    }

    fn rope(&self, rope: Rope) -> DeviceRope<D> {
        let (cos, sin) = (Buffer::of(&self.device, &rope.cos), Buffer::of(&self.device, &rope.sin));
        DeviceRope { cos, sin, half: rope.half, interleaved: rope.interleaved }
    }

    fn rows(&self, rows_max: usize, width: usize) -> Rows<D> {
        Rows {
            width,
            count: 0,
            values: Buffer::new(&self.device, rows_max * width),
            halves: Buffer::new(&self.device, 0),
            is_half: false,
            host: Vec::new(),
        }
    }

    fn cache(&self, shape: CacheShape) -> Cache<D> {
        Cache::new(&self.device, shape)
    }

    fn block_bytes(shape: CacheShape) -> usize {
        let tokens = shape.layers * shape.heads.kv * BLOCK_TOKENS;
        let scales = if shape.dtype == KvDtype::Int8 { 2 * tokens * size_of::<f32>() } else { 0 };
        2 * tokens * padded(shape.heads.dim) * value_bytes(shape.dtype) + scales
    }

    fn begin(&mut self, batch: &Batch, cache: &Cache<D>) {
        self.step.fill(batch, cache.shape.heads, self.is_invariant);
    }

    fn embed(&mut self, table: &Matrix<D>, batch: &Batch, scale: f32, out: &mut Rows<D>) {
        out.reserve(batch.tokens.len(), table.inputs);
        if out.count > 0 {
            table.embed(&self.device, self.step.tokens, out.count, scale, &out.values);
        }
    }

    fn norm_linear(&mut self, x: &Rows<D>, norm: &DeviceNorm<D>, w: &Matrix<D>, out: &mut Rows<D>) {
        out.reserve(x.count, w.outputs);
        self.norm_inputs(x, 0, x.count, norm);
        self.inputs.multiply(w, x.count, &out.values, false);
    }

    fn rope_write(
        &mut self,
        qkv: &mut Rows<D>,
        norms: Option<&HeadNorms<DeviceNorm<D>>>,
        rope: &DeviceRope<D>,
        _: &Batch,
        layer: usize,
        cache: &mut Cache<D>,
    ) {
        let Heads { query, kv, dim } = cache.shape.heads;
        let padded = padded(dim);
        self.queries.reserve(qkv.count * query * padded);
        let kernel = match cache.shape.dtype {
            KvDtype::F16 => c"rope_write_f16",
            KvDtype::Bf16 => c"rope_write_bf16",
            KvDtype::Int8 => c"rope_write_int8",
        };
        let (query_gains, key_gains) = norms.map_or((0, 0), |norms| (norms.query.gains.at(), norms.key.gains.at()));
        let epsilon = norms.map_or(0.0, |norms| norms.query.epsilon);
        let [keys, values, key_scales, value_scales] = cache.layer(layer);
        // SAFETY: the step's rows have places in the table of angles and in the cache, and the queries have room
        unsafe {
            launch!(self.device, kernel, [qkv.count as u32, 1], ATTENTION_THREADS, 0;
                qkv.values.at(), self.step.positions, self.step.slots, rope.cos.at(), rope.sin.at(), query_gains,
                key_gains, epsilon, rope.half as i32, i32::from(rope.interleaved), query as i32, kv as i32, dim as i32,
                padded as i32, self.queries.at(), keys, values, key_scales, value_scales);
        }
    }

    fn attention(&mut self, qkv: &Rows<D>, view: View, _: &Batch, layer: usize, cache: &Cache<D>, out: &mut Rows<D>) {
        (out.count, out.width, out.is_half) = (qkv.count, cache.shape.heads.query_width(), true);
        out.halves.reserve(out.count * out.width);
        self.attend(true, view, layer, cache, out.halves.at());
        self.attend(false, view, layer, cache, out.halves.at());
    }

    fn linear_add(&mut self, x: &Rows<D>, w: &Matrix<D>, norm: Option<&DeviceNorm<D>>, residual: &mut Rows<D>) {
        assert!(x.is_half, "what is multiplied without more is what attention gave");
        self.multiply_add(Some(x.halves.at()), w, norm, residual);
    }

    fn gated_linear_add(
        &mut self,
        gate_up: &Rows<D>,
        activation: Activation,
        w: &Matrix<D>,
        norm: Option<&DeviceNorm<D>>,
        residual: &mut Rows<D>,
    ) {
        self.gate_inputs(gate_up.values.at(), gate_up.count, w.inputs, activation);
        self.multiply_add(None, w, norm, residual);
    }

    fn experts_add(&mut self, norm: &DeviceNorm<D>, experts: &Experts<Matrix<D>>, residual: &mut Rows<D>) {
        let (count, width, of) = (residual.count, residual.width, experts.gate_up.len());
        self.norm_inputs(residual, 0, count, norm);
        // the normed rows stay while the inputs are the gated ones
        std::mem::swap(&mut self.inputs.rows, &mut self.mixture.normed);
        let normed = self.mixture.normed.at();
        self.mixture.scores.reserve(count * of);
        self.mixture.weights.reserve(count * of);
        self.inputs.multiply_rows(normed, &experts.router, count, &self.mixture.scores, false);
        // SAFETY: there is a score and a weight for each row and expert
        unsafe {
            launch!(self.device, c"route", [count as u32, 1], 32, 0; self.mixture.scores.at(), of as i32,
                experts.used as i32, i32::from(experts.is_normalized), self.mixture.weights.at());
        }
        for (i, (gate_up, down)) in experts.gate_up.iter().zip(&experts.down).enumerate() {
            self.mixture.gate_up.reserve(count * gate_up.outputs);
            self.product.reserve(count * width);
            self.inputs.multiply_rows(normed, gate_up, count, &self.mixture.gate_up, false);
            self.gate_inputs(self.mixture.gate_up.at(), count, down.inputs, experts.activation);
            self.inputs.multiply(down, count, &self.product, false);
            // SAFETY: the product is as large as the residual, and there is a weight for each row
            unsafe {
                launch!(self.device, c"add_weighted", [count as u32, 1], THREADS, 0; self.product.at(),
                    self.mixture.weights.at(), of as i32, i as i32, width as i32, residual.values.at());
            }
        }
        std::mem::swap(&mut self.inputs.rows, &mut self.mixture.normed);
    }

    fn head(&mut self, x: &Rows<D>, batch: &Batch, norm: &DeviceNorm<D>, w: &Matrix<D>, logits: &mut Rows<D>) {
        let count = batch.logit_rows.len();
        logits.reserve(count, w.outputs);
        self.norm_inputs(x, self.step.logit_rows, count, norm);
        self.inputs.multiply(w, count, &logits.values, false);
    }

    fn hidden(&mut self, x: &Rows<D>, batch: &Batch, norm: &DeviceNorm<D>, out: &mut Rows<D>) {
        let count = batch.hidden_rows.len();
        out.reserve(count, x.width);
        if count > 0 {
            // SAFETY: `x` has the picked rows, and `out` has room for them
            unsafe {
                launch!(self.device, c"rms_norm_f32", [count as u32, 1], THREADS, 0; x.values.at(), self.step.hidden_rows,
                    norm.gains.at(), norm.epsilon, x.width as i32, out.values.at());
            }
        }
    }

    const PICKS: bool = true;

    fn choose<'a>(&'a mut self, logits: &'a mut Rows<D>, batch: &Batch) -> (&'a [f32], &'a [u32]) {
        if batch.picks.is_empty() {
            return (self.read(logits), &[]);
        }
        let Picked { picks, rows, tokens, host } = &mut self.picked;
        let of_rows = || batch.picks.iter().zip(0u32..);
        let (chosen, which): (Vec<Pick>, Vec<u32>) = of_rows().filter_map(|(p, row)| Some(((*p)?, row))).unzip();
        host.resize(chosen.len(), 0);
        if !chosen.is_empty() {
            picks.write(words(&chosen));
            rows.write(&which);
            tokens.reserve(chosen.len());
            // SAFETY: the rows are there, and each has a pick and room for its token
            unsafe {
                launch!(self.device, c"pick_tokens", [chosen.len() as u32, 1], PICK_THREADS, 0; logits.values.at(),
                    logits.width as i32, rows.at(), picks.at(), tokens.at());
            }
            tokens.read(host);
        }
        let others = || of_rows().filter(|(pick, _)| pick.is_none()).map(|(_, row)| row as usize);
        logits.host.resize(others().count() * logits.width, 0.0);
        for (row, to) in others().zip(logits.host.chunks_exact_mut(logits.width)) {
            logits.values.read_from(row * logits.width, to);
        }
        (&logits.host, host)
    }

    fn read<'a>(&self, rows: &'a mut Rows<D>) -> &'a [f32] {
        rows.host.resize(rows.count * rows.width, 0.0);
        if rows.is_half {
            let mut halves = vec![bf16::ZERO; rows.host.len()];
            rows.halves.read(&mut halves);
            rows.host.iter_mut().zip(halves).for_each(|(to, from)| *to = from.to_f32());
        } else {
            rows.values.read(&mut rows.host);
        }
        &rows.host
    }
}

#[cfg(test)]
mod tests;
