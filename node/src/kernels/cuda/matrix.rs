//! Weights on the device, and products with them.
//!
//! Weights of 16 bits and more are kept as bf16 `[N, K]`. Quantized ones are kept in tiles of 16 outputs by 32 inputs, in the order in
//! which the lanes of a warp take them to the tensor cores (`Share` in `linear.cuh`), with their scales apart: 4 bits as they are, 5 and
//! 6 bits in 8, exactly.

use std::{ffi::CStr, sync::Arc};

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::device::{Buffer, Device, ProductSizes, THREADS, launch};
use crate::{
    kernels::blocks::{self, Block},
    weights::Weight,
};

/// Outputs of a tile.
const OUTPUTS: usize = 16;

/// Inputs of a tile, which share a scale.
pub(super) const GROUP: usize = 32;

/// Lanes of a warp.
const LANES: usize = 32;

/// Rows from which on the device's own product of large matrices is asked for.
const MANY_ROWS: usize = 65;

/// How packed values stand for weights, less their offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// 4 bits from -8 on, one scale.
    Four,
    /// 4 bits from 0 on, a scale and a minimum.
    FourMin,
    /// 8 bits from -128 on, one scale.
    Eight,
    /// The same with a minimum.
    EightMin,
    /// The same with a scale for each 16 inputs.
    EightHalves,
}

/// One or more matrices whose outputs stand side by side.
pub struct Matrix<D: Device> {
    parts: Vec<Part<D>>,
    /// `[N]`
    bias: Option<Buffer<D, f32>>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Weights of one form.
struct Part<D: Device> {
    outputs: usize,
    form: Form<D>,
}

enum Form<D: Device> {
    Dense(Buffer<D, bf16>),
    Packed { format: Format, tiles: Buffer<D, u32>, scales: Buffer<D, f16>, mins: Buffer<D, f16> },
}

/// Rows of bf16 that are multiplied, with the sums of each 32 of them where minimums need them, and room for unpacked weights.
pub(super) struct Inputs<D: Device> {
    device: Arc<D>,
    /// Whether our own kernels multiply many rows too: they make each row's sums in one order, whatever the number of rows.
    is_invariant: bool,
    /// `[T, K]`
    pub(super) rows: Buffer<D, bf16>,
    /// `[T, K / 32]`
    sums: Buffer<D, f32>,
    unpacked: Buffer<D, bf16>,
}

impl Format {
    fn of(dtype: GgmlDType) -> Option<Self> {
        Some(match dtype {
            GgmlDType::Q4_0 => Self::Four,
            GgmlDType::Q4_1 | GgmlDType::Q4K => Self::FourMin,
            GgmlDType::Q5_0 | GgmlDType::Q8_0 => Self::Eight,
            GgmlDType::Q5_1 | GgmlDType::Q5K => Self::EightMin,
            GgmlDType::Q6K => Self::EightHalves,
            _ => return None,
        })
    }

    fn bits(self) -> usize {
        if matches!(self, Self::Four | Self::FourMin) { 4 } else { 8 }
    }

    fn has_min(self) -> bool {
        matches!(self, Self::FourMin | Self::EightMin)
    }

    fn scales_a_tile(self) -> usize {
        if self == Self::EightHalves { 2 } else { 1 }
    }

    /// What is added to a file's unsigned value to make it one of ours.
    fn shift(dtype: GgmlDType) -> u8 {
        match dtype {
            GgmlDType::Q5_0 => 128 - 16,
            GgmlDType::Q6K => 128 - 32,
            GgmlDType::Q5_1 | GgmlDType::Q5K => 128,
            _ => 0,
        }
    }

    /// Products of up to 8, 16, 32 and 64 rows at a time.
    fn products(self) -> [&'static CStr; 4] {
        match self {
            Self::Four => [c"linear_four_1", c"linear_four_2", c"linear_four_4", c"linear_four_8"],
            Self::FourMin => [c"linear_four_min_1", c"linear_four_min_2", c"linear_four_min_4", c"linear_four_min_8"],
            Self::Eight => [c"linear_eight_1", c"linear_eight_2", c"linear_eight_4", c"linear_eight_8"],
            Self::EightMin => {
                [c"linear_eight_min_1", c"linear_eight_min_2", c"linear_eight_min_4", c"linear_eight_min_8"]
            }
            Self::EightHalves => {
                [c"linear_eight_halves_1", c"linear_eight_halves_2", c"linear_eight_halves_4", c"linear_eight_halves_8"]
            }
        }
    }

    fn embed(self) -> &'static CStr {
        match self {
            Self::Four => c"embed_four",
            Self::FourMin => c"embed_four_min",
            Self::Eight => c"embed_eight",
            Self::EightMin => c"embed_eight_min",
            Self::EightHalves => c"embed_eight_halves",
        }
    }

    fn unpack(self) -> &'static CStr {
        match self {
            Self::Four => c"unpack_four",
            Self::FourMin => c"unpack_four_min",
            Self::Eight => c"unpack_eight",
            Self::EightMin => c"unpack_eight_min",
            Self::EightHalves => c"unpack_eight_halves",
        }
    }
}

const DENSE_PRODUCTS: [&CStr; 4] = [c"linear_dense_1", c"linear_dense_2", c"linear_dense_4", c"linear_dense_8"];

/// Threads of a block that multiplies: `LINEAR_WARPS` warps.
const LINEAR_THREADS: u32 = 128;

/// Packed weights on the host.
struct Tiles {
    format: Format,
    words: Vec<u32>,
    scales: Vec<f16>,
    mins: Vec<f16>,
}

impl Tiles {
    /// None when its type has no packed form, or one of its scales no f16.
    fn pack(weight: &Weight) -> Option<Self> {
        let format = Format::of(weight.dtype())?;
        let (groups, tile_rows) = (weight.cols() / GROUP, weight.rows().div_ceil(OUTPUTS));
        let row_words = groups * LANES * format.bits() / 2;
        let row_scales = groups * OUTPUTS * format.scales_a_tile();
        let row_mins = if format.has_min() { groups * OUTPUTS } else { 0 };
        let mut tiles = Self {
            format,
            words: vec![0; tile_rows * row_words],
            scales: vec![f16::ZERO; tile_rows * row_scales],
            mins: vec![f16::ZERO; tile_rows * row_mins],
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let each = tile_rows.div_ceil(threads);
        let are_finite = std::thread::scope(|scope| {
            let mut mins = tiles.mins.chunks_mut((each * row_mins).max(1));
            let words = tiles.words.chunks_mut(each * row_words);
            let parts: Vec<_> = words
                .zip(tiles.scales.chunks_mut(each * row_scales))
                .enumerate()
                .map(|(i, (words, scales))| {
                    let mut part = Share { format, groups, words, scales, mins: mins.next().unwrap_or_default() };
                    scope.spawn(move || part.fill(weight, i * each * OUTPUTS))
                })
                .collect();
            // every thread is waited for, also after one found a scale that does not fit
            parts.into_iter().map(|part| part.join().expect("packing does not panic")).fold(true, |a, b| a & b)
        });
        are_finite.then_some(tiles)
    }
}

/// Some rows of tiles, to be filled by one thread.
struct Share<'a> {
    format: Format,
    groups: usize,
    words: &'a mut [u32],
    scales: &'a mut [f16],
    mins: &'a mut [f16],
}

impl Share<'_> {
    /// Fills it with the matrix's rows from `first` on. Whether all scales have an f16.
    fn fill(&mut self, weight: &Weight, first: usize) -> bool {
        let mut are_finite = true;
        let rows = self.words.len() / (self.groups * LANES * self.format.bits() / 2) * OUTPUTS;
        for row in 0..rows.min(weight.rows() - first) {
            let mut group = 0;
            blocks::for_each(weight.dtype(), weight.row_bytes(first + row), |block| {
                are_finite &= block.scales.iter().chain([&block.min]).all(|x| f16::from_f32(*x).is_finite());
                self.put(row, group, block, Format::shift(weight.dtype()));
                group += 1;
            });
        }
        are_finite
    }

    fn put(&mut self, row: usize, group: usize, block: &Block, shift: u8) {
        let (tile, row) = (row / OUTPUTS * self.groups + group, row % OUTPUTS);
        let (g, is_high) = (row % 8, row / 8);
        // scales of rows g and g + 8 stand beside each other
        let place = 2 * g + is_high;
        let per_tile = self.format.scales_a_tile();
        for (half, scale) in block.scales.iter().take(per_tile).enumerate() {
            self.scales[(per_tile * tile + half) * OUTPUTS + place] = f16::from_f32(*scale);
        }
        if self.format.has_min() {
            self.mins[tile * OUTPUTS + place] = f16::from_f32(block.min);
        }
        let bits = self.format.bits();
        for (k, value) in block.values.iter().enumerate() {
            let (step, t, pair) = (k / 16, k % 16 / 4, k % 4 / 2);
            let pair = 2 * step + pair;
            let word = match bits {
                4 => is_high,
                _ => 2 * is_high + pair / 2,
            };
            let shift_bits = 16 * (k % 2) + if bits == 4 { 4 * pair } else { 8 * (pair % 2) };
            let lane = 4 * g + t;
            self.words[(tile * LANES + lane) * bits / 2 + word] |= u32::from(value.wrapping_add(shift)) << shift_bits;
        }
    }
}

impl<D: Device> Form<D> {
    fn new(device: &Arc<D>, weight: &Weight) -> Self {
        if let Some(tiles) = Tiles::pack(weight) {
            return Self::Packed {
                format: tiles.format,
                tiles: Buffer::of(device, &tiles.words),
                scales: Buffer::of(device, &tiles.scales),
                mins: Buffer::of(device, &tiles.mins),
            };
        }
        let mut row = vec![0.0; weight.cols()];
        let mut dense = Vec::with_capacity(weight.rows() * weight.cols());
        for i in 0..weight.rows() {
            weight.dequantize_row(i, &mut row);
            dense.extend(row.iter().map(|x| bf16::from_f32(*x)));
        }
        Self::Dense(Buffer::of(device, &dense))
    }
}

impl<D: Device> Matrix<D> {
    pub(super) fn new(device: &Arc<D>, weights: &[Weight], bias: &[f32]) -> Self {
        let inputs = weights[0].cols();
        let parts = weights.iter().map(|w| Part { outputs: w.rows(), form: Form::new(device, w) }).collect();
        let outputs = weights.iter().map(Weight::rows).sum();
        Self { parts, bias: (!bias.is_empty()).then(|| Buffer::of(device, bias)), outputs, inputs }
    }

    /// `out[T, K] = scale * rows[tokens]`, of the first part.
    pub(super) fn embed(&self, device: &D, tokens: u64, count: usize, scale: f32, out: &Buffer<D, f32>) {
        let (grid, inputs) = ([count as u32, 1], self.inputs as i32);
        // SAFETY: `tokens` are rows of the matrix, and `out` has a row for each
        unsafe {
            match &self.parts[0].form {
                Form::Dense(w) => {
                    launch!(device, c"embed_dense", grid, THREADS, 0; w.at(), tokens, scale, inputs, out.at());
                }
                Form::Packed { format, tiles, scales, mins } => {
                    launch!(device, format.embed(), grid, THREADS, 0;
                        tiles.at(), scales.at(), mins.at(), tokens, scale, inputs, out.at());
                }
            }
        }
    }
}

impl<D: Device> Inputs<D> {
    pub(super) fn new(device: &Arc<D>, is_invariant: bool) -> Self {
        let device = device.clone();
        let (rows, sums, unpacked) = (Buffer::new(&device, 0), Buffer::new(&device, 0), Buffer::new(&device, 0));
        Self { device, is_invariant, rows, sums, unpacked }
    }

    /// `out[T, N] = x @ W^T + bias` of its own rows, or added to `out`.
    pub(super) fn multiply(&mut self, w: &Matrix<D>, count: usize, out: &Buffer<D, f32>, add: bool) {
        let rows = self.rows.at();
        self.multiply_rows(rows, w, count, out, add);
    }

    /// The same of rows that lie elsewhere.
    pub(super) fn multiply_rows(&mut self, x: u64, w: &Matrix<D>, count: usize, out: &Buffer<D, f32>, add: bool) {
        if count == 0 {
            return;
        }
        assert!(w.inputs.is_multiple_of(GROUP), "rows of {} values do not divide into groups of {GROUP}", w.inputs);
        let device = self.device.clone();
        if let Some(bias) = &w.bias {
            let kernel = if add { c"add_bias" } else { c"fill_bias" };
            // SAFETY: the bias is as long as a row of `out`, which has `count` of them
            unsafe { launch!(device, kernel, [count as u32, 1], THREADS, 0; bias.at(), w.outputs as i32, out.at()) };
        }
        if w.parts.iter().any(|part| part.needs_sums()) {
            self.sums.reserve(count * w.inputs / GROUP);
            // SAFETY: there are `count` rows, and a sum for each group of them
            unsafe {
                launch!(device, c"group_sums", [count as u32, 1], THREADS, 0; x, w.inputs as i32, self.sums.at());
            }
        }
        let mut first = 0;
        for part in &w.parts {
            let sizes = ProductSizes {
                rows: count,
                outputs: part.outputs,
                inputs: w.inputs,
                stride: w.outputs,
                add: add || w.bias.is_some(),
            };
            // SAFETY: rows, weights and outputs are as large as the sizes say
            unsafe { self.multiply_part(x, part, out.at_value(first), sizes) };
            first += part.outputs;
        }
    }

    unsafe fn multiply_part(&mut self, x: u64, part: &Part<D>, out: u64, sizes: ProductSizes) {
        let device = self.device.clone();
        // SAFETY: the caller's promises
        unsafe {
            if !self.is_invariant && sizes.rows >= MANY_ROWS && self.multiply_many(x, part, out, sizes) {
                return;
            }
            let ProductSizes { rows, outputs, inputs, stride, add } = sizes;
            let size = [8, 16, 32].iter().position(|most| rows <= *most).unwrap_or(3);
            let grid = [outputs.div_ceil(OUTPUTS) as u32, rows.div_ceil(8 << size) as u32];
            let (t, n, k) = (rows as i32, outputs as i32, inputs as i32);
            let (stride, add) = (stride as i32, i32::from(add));
            match &part.form {
                Form::Dense(w) => {
                    launch!(device, DENSE_PRODUCTS[size], grid, LINEAR_THREADS, 0; w.at(), x, out, t, n, k, stride, add);
                }
                Form::Packed { format, tiles, scales, mins } => {
                    launch!(device, format.products()[size], grid, LINEAR_THREADS, 0;
                        tiles.at(), scales.at(), mins.at(), x, self.sums.at(), out, t, n, k, stride, add);
                }
            }
        }
    }

    /// The device's own product, of weights that are unpacked first if need be.
    unsafe fn multiply_many(&mut self, x: u64, part: &Part<D>, out: u64, sizes: ProductSizes) -> bool {
        let device = self.device.clone();
        // SAFETY: the caller's promises, and the room for unpacked weights is as large as they are
        unsafe {
            match &part.form {
                Form::Dense(w) => device.product(x, w.at(), out, sizes),
                Form::Packed { format, tiles, scales, mins } => {
                    self.unpacked.reserve(sizes.outputs * sizes.inputs);
                    launch!(device, format.unpack(), [sizes.outputs as u32, 1], THREADS, 0;
                        tiles.at(), scales.at(), mins.at(), sizes.inputs as i32, self.unpacked.at());
                    device.product(x, self.unpacked.at(), out, sizes)
                }
            }
        }
    }
}

impl<D: Device> Part<D> {
    fn needs_sums(&self) -> bool {
        matches!(self.form, Form::Packed { format, .. } if format.has_min())
    }
}
