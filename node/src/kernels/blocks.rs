//! GGML's quantized blocks as runs of 32 unsigned values with their scales, which is what tiles are made of.
//!
//! # Source
//! The layouts of ggml's `ggml-common.h` (block_q4_0 to block_q6_K).

use candle_core::quantized::GgmlDType;
use half::f16;

/// 32 values of one row.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// Of each half; equal where a type has one for both.
    pub(super) scales: [f32; 2],
    /// What is added to `scale * value`; zero in types that count from a middle value.
    pub(super) min: f32,
    pub(super) values: [u8; 32],
}

/// Gives every run of 32 values in a row's bytes.
pub(super) fn for_each(dtype: GgmlDType, row: &[u8], mut give: impl FnMut(&Block)) {
    let mut block = Block::default();
    for bytes in row.chunks_exact(dtype.type_size()) {
        match dtype {
            GgmlDType::Q4_0 => give(block.four(half(bytes, 0), 0.0, &bytes[2..])),
            GgmlDType::Q4_1 => give(block.four(half(bytes, 0), half(bytes, 2), &bytes[4..])),
            GgmlDType::Q5_0 => give(block.five(half(bytes, 0), 0.0, &bytes[2..])),
            GgmlDType::Q5_1 => give(block.five(half(bytes, 0), half(bytes, 2), &bytes[4..])),
            GgmlDType::Q8_0 => give(block.eight(half(bytes, 0), &bytes[2..])),
            GgmlDType::Q4K => (0..8).for_each(|i| give(block.four_k(bytes, i))),
            GgmlDType::Q5K => (0..8).for_each(|i| give(block.five_k(bytes, i))),
            GgmlDType::Q6K => (0..8).for_each(|i| give(block.six_k(bytes, i))),
            _ => unreachable!("only types with a tile form are packed"),
        }
    }
}

impl Block {
    fn scaled(&mut self, scale: f32, min: f32) -> &mut Self {
        (self.scales, self.min) = ([scale; 2], min);
        self
    }

    /// Nibbles: value `j` below, value `j + 16` above.
    fn nibbles(&mut self, nibbles: &[u8]) {
        let (low, high) = self.values.split_at_mut(16);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(nibbles) {
            (*low, *high) = (byte & 15, byte >> 4);
        }
    }

    fn four(&mut self, scale: f32, min: f32, nibbles: &[u8]) -> &Self {
        self.nibbles(nibbles);
        self.scaled(scale, min)
    }

    /// Four bytes of fifth bits, then nibbles.
    fn five(&mut self, scale: f32, min: f32, bytes: &[u8]) -> &Self {
        self.nibbles(&bytes[4..]);
        for (j, value) in self.values.iter_mut().enumerate() {
            *value |= ((bytes[j / 8] >> (j % 8)) & 1) << 4;
        }
        self.scaled(scale, min)
    }

    /// Signed bytes, which become unsigned by adding 128: flipping the top bit.
    fn eight(&mut self, scale: f32, bytes: &[u8]) -> &Self {
        self.values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = byte ^ 0x80);
        self.scaled(scale, 0.0)
    }

    /// Run `i` of a block of 256: two scales f16, 12 bytes of scales and minimums of 6 bits, nibbles; each 32 bytes of them hold one run
    /// below and the next above.
    fn four_k(&mut self, bytes: &[u8], i: usize) -> &Self {
        self.k_nibbles(&bytes[16..], i);
        self.k_scaled(bytes, i)
    }

    /// The same with 32 bytes of fifth bits before the nibbles: bit `i` of byte `j` is that of value `j` of run `i`.
    fn five_k(&mut self, bytes: &[u8], i: usize) -> &Self {
        self.k_nibbles(&bytes[48..], i);
        for (value, bits) in self.values.iter_mut().zip(&bytes[16..48]) {
            *value |= ((bits >> i) & 1) << 4;
        }
        self.k_scaled(bytes, i)
    }

    fn k_nibbles(&mut self, nibbles: &[u8], i: usize) {
        let nibbles = &nibbles[i / 2 * 32..];
        self.values.iter_mut().zip(nibbles).for_each(|(value, byte)| *value = (byte >> (4 * (i % 2))) & 15);
    }

    fn k_scaled(&mut self, bytes: &[u8], i: usize) -> &Self {
        let packed = &bytes[4..16];
        let (scale, min) = match i {
            0..4 => (packed[i] & 63, packed[i + 4] & 63),
            _ => {
                let (high_scale, high_min) = (packed[i - 4] >> 6, packed[i] >> 6);
                (packed[i + 4] & 15 | high_scale << 4, packed[i + 4] >> 4 | high_min << 4)
            }
        };
        self.scaled(half(bytes, 0) * f32::from(scale), -half(bytes, 2) * f32::from(min))
    }

    /// Run `i` of a block of 256: 128 bytes of low nibbles, 64 bytes of two high bits each, 16 signed scales, one scale f16.
    fn six_k(&mut self, bytes: &[u8], i: usize) -> &Self {
        let (part, run) = (i / 4, i % 4);
        let (low, high) = (&bytes[64 * part + 32 * (run % 2)..], &bytes[128 + 32 * part..]);
        for (j, value) in self.values.iter_mut().enumerate() {
            *value = (low[j] >> (4 * (run / 2))) & 15 | ((high[j] >> (2 * run)) & 3) << 4;
        }
        let scale = |j: usize| half(bytes, 208) * f32::from(bytes[192 + 2 * i + j] as i8);
        (self.scales, self.min) = ([scale(0), scale(1)], 0.0);
        self
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}
