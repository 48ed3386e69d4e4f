//! What the machine can do at most with given threads: read memory, and multiply int8. Plain loops at the width of the machine's widest
//! registers; the best of several windows, since whatever disturbs a limit only lowers it.
#![allow(unsafe_code, reason = "calls of functions for instructions that were detected just before")]

use std::{
    hint::black_box,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

const WINDOWS: usize = 4;
const WINDOW: Duration = Duration::from_millis(100);

/// Bytes per second that `threads` threads read together, over and over, from a buffer of `bytes`.
pub(crate) fn read_bytes_per_s(threads: usize, bytes: usize) -> f64 {
    let words: Vec<u64> = (0..bytes as u64 / 8).collect();
    let shares: Vec<&[u64]> = words.chunks(words.len().div_ceil(threads)).collect();
    best(shares.len(), |thread| {
        black_box(sum(shares[thread]));
        size_of_val(shares[thread]) as f64
    })
}

/// int8 products (of 8 bits with 8 bits, added up in 32) per second of `threads` threads together, by `vpdpbusd` on registers of 512
/// bits; none where the machine lacks it.
pub(crate) fn int8_macs_per_s(threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        return Some(best(threads, |_| {
            // SAFETY: the features were detected just above
            black_box(unsafe { x86::dot_products() });
            x86::MACS
        }));
    }
    None
}

/// The most that `threads` threads do together in a second; `work` tells how much one call did.
fn best(threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    (0..WINDOWS).map(|_| window(threads, &work)).fold(0.0, f64::max)
}

fn window(threads: usize, work: &(impl Fn(usize) -> f64 + Sync)) -> f64 {
    let start = Barrier::new(threads);
    let one = |thread| {
        start.wait();
        let (began, mut done) = (Instant::now(), 0.0);
        while began.elapsed() < WINDOW {
            done += work(thread);
        }
        done / began.elapsed().as_secs_f64()
    };
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|thread| scope.spawn(move || one(thread))).collect();
        all.into_iter().map(|one| one.join().expect("a measuring thread does not panic")).sum()
    })
}

fn sum(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was detected just above
            return unsafe { x86::sum_avx512(words) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above
            return unsafe { x86::sum_avx2(words) };
        }
    }
    sum_lanes(words)
}

/// Adds in lanes that the compiler keeps in registers as wide as the caller's.
#[inline(always)]
fn sum_lanes(words: &[u64]) -> u64 {
    let (chunks, _) = words.as_chunks::<64>();
    let mut lanes = [0_u64; 64];
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    /// Enough that a sum is ready again when its turn comes: latency 5, two a cycle.
    const SUMS: usize = 12;
    const ROUNDS: usize = 10_000;

    /// Products of one call of [`dot_products`].
    pub(super) const MACS: f64 = (ROUNDS * SUMS * 64) as f64;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dot_products() -> i32 {
        let (x, w) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, w);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_epi32(sum)).fold(0, i32::wrapping_add)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum_avx512(words: &[u64]) -> u64 {
        super::sum_lanes(words)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn sum_avx2(words: &[u64]) -> u64 {
        super::sum_lanes(words)
    }
}
