//! Times the Adam kernels beside a streaming floor in the same process.
//!
//! ```text
//! cargo run --release -p zeroxide-optim --example adam_bench -- --params 100000000 --threads 2
//! cargo run --release -p zeroxide-optim --example adam_bench -- --once fp32 --params 1000000 --isa avx2
//! ```
//!
//! The floor of a format reads and writes exactly the arrays that its step reads and writes, with one
//! integer operation per element. Each step runs between two floors, so that the machine's noise falls on both;
//! `ratio_median` is the median of floor over step within a round, `ratio_min` that of the fastest runs. The
//! result is one JSON line. `--once` runs a single step and prints nothing: for callgrind and the like.

use std::hint::black_box;
use std::time::Instant;

use bytemuck::cast_slice_mut;
use zeroxide_layout::{Dtype, Format, StateLayout};
use zeroxide_optim::{
    AdamParams, Grad, Isa, Optimizer, Pool, Step, bf16_half_up, isa, split, update_with,
};

/// Elements per task, as the streaming step cuts them.
const TILE: usize = 1 << 18;

/// The streaming floor: the same reads and writes, almost no arithmetic.
mod floor {
    use zeroxide_optim::Isa;

    #[inline(always)]
    fn fp32_loop(
        master: &mut [f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        grad: &[u16],
        out: &mut [u16],
    ) {
        for ((((p, m), v), g), o) in master
            .iter_mut()
            .zip(exp_avg)
            .zip(exp_avg_sq)
            .zip(grad)
            .zip(out)
        {
            let bits = u32::from(*g);
            *p = f32::from_bits(p.to_bits() ^ bits);
            *m = f32::from_bits(m.to_bits() ^ bits);
            *v = f32::from_bits(v.to_bits() ^ bits);
            *o = *g;
        }
    }

    #[inline(always)]
    fn split_loop(
        high: &mut [u16],
        low: &mut [u16],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        grad: &[u16],
    ) {
        for ((((h, l), m), v), g) in high
            .iter_mut()
            .zip(low)
            .zip(exp_avg)
            .zip(exp_avg_sq)
            .zip(grad)
        {
            let bits = u32::from(*g);
            *h ^= *g;
            *l ^= *g;
            *m = f32::from_bits(m.to_bits() ^ bits);
            *v = f32::from_bits(v.to_bits() ^ bits);
        }
    }

    macro_rules! instantiate {
        ($name:ident = $body:ident($($arg:ident: $ty:ty),*)) => {
            pub(crate) fn $name(isa: Isa, $($arg: $ty),*) {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) { $body($($arg),*); }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) { $body($($arg),*); }
                assert!(isa.is_supported(), "this processor has no {}", isa.name());
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the processor has these instructions, asserted above.
                    Isa::Avx2 => unsafe { avx2($($arg),*) },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the processor has these instructions, asserted above.
                    Isa::Avx512 => unsafe { avx512($($arg),*) },
                    _ => $body($($arg),*),
                }
            }
        };
    }
    instantiate!(fp32 = fp32_loop(
        master: &mut [f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], grad: &[u16], out: &mut [u16]
    ));
    instantiate!(split = split_loop(
        high: &mut [u16], low: &mut [u16], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], grad: &[u16]
    ));
}

/// An empty vector with room for `len` elements in huge pages, as the engine's arenas have.
fn with_huge_pages<T>(len: usize) -> Vec<T> {
    const HUGE: usize = 2 << 20;
    let values = Vec::<T>::with_capacity(len);
    #[cfg(target_os = "linux")]
    {
        let start = values.as_ptr().addr().next_multiple_of(HUGE);
        let end = (values.as_ptr().addr() + values.capacity() * size_of::<T>()) & !(HUGE - 1);
        if start < end {
            let address = values.as_ptr().cast_mut().with_addr(start).cast();
            // SAFETY: the range lies within the allocation that `values` owns, and the advice does not
            // change what it holds. A refusal only makes the run slower.
            unsafe { libc::madvise(address, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    values
}

fn filled<T>(len: usize, value: impl Fn(usize) -> T) -> Vec<T> {
    let mut values = with_huge_pages(len);
    values.extend((0..len).map(value));
    values
}

/// State of all parameters; every format's arrays lie here, each used by its own runs only.
struct State {
    master: Vec<f32>,
    high: Vec<u16>,
    low: Vec<u16>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    grad: Vec<u16>,
    out: Vec<u16>,
}

impl State {
    fn new(len: usize) -> Self {
        let wave = |i: usize| {
            let bits = u32::try_from(i % (1 << 20))
                .expect("below 2^20")
                .wrapping_mul(0x9e37_79b9);
            f32::from_bits((bits >> 9) | 0x3f80_0000) - 1.5
        };
        let master = filled(len, |i| 0.04 * wave(i));
        Self {
            high: filled(len, |i| split(master[i]).0),
            low: filled(len, |i| split(master[i]).1),
            exp_avg: filled(len, |i| 1e-3 * wave(i + 1)),
            exp_avg_sq: filled(len, |i| 1e-6 * wave(i + 2).powi(2)),
            grad: filled(len, |i| bf16_half_up(1e-3 * wave(i + 3))),
            out: filled(len, |_| 0),
            master,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Run {
    FloorFp32,
    StepFp32,
    FloorSplit,
    StepSplit,
}

fn run(kind: Run, pool: &Pool, isa: Isa, step: &Step, state: &mut State) -> f64 {
    let format = match kind {
        Run::FloorFp32 | Run::StepFp32 => Format::Fp32,
        Run::FloorSplit | Run::StepSplit => Format::Split,
    };
    let moments = Optimizer::from(AdamParams::default()).moments();
    let layout = StateLayout::new(Dtype::Bf16, format, &moments).expect("they go together");
    let start = Instant::now();
    let moments = state
        .exp_avg
        .chunks_mut(TILE)
        .zip(state.exp_avg_sq.chunks_mut(TILE));
    let shared = moments.zip(state.grad.chunks(TILE));
    match kind {
        Run::FloorFp32 | Run::StepFp32 => {
            let low = state
                .master
                .chunks_mut(TILE)
                .zip(state.out.chunks_mut(TILE));
            pool.run_each(shared.zip(low).collect(), |_, (((m, v), g), (p, o))| {
                if kind == Run::StepFp32 {
                    let tensors = [
                        cast_slice_mut(o),
                        cast_slice_mut(p),
                        cast_slice_mut(m),
                        cast_slice_mut(v),
                    ];
                    update_with(isa, step, &layout, tensors, Grad::Bf16(g));
                } else {
                    floor::fp32(isa, p, m, v, g, o);
                }
            });
        }
        Run::FloorSplit | Run::StepSplit => {
            let halves = state.high.chunks_mut(TILE).zip(state.low.chunks_mut(TILE));
            pool.run_each(shared.zip(halves).collect(), |_, (((m, v), g), (h, l))| {
                if kind == Run::StepSplit {
                    let tensors = [
                        cast_slice_mut(h),
                        cast_slice_mut(l),
                        cast_slice_mut(m),
                        cast_slice_mut(v),
                    ];
                    update_with(isa, step, &layout, tensors, Grad::Bf16(g));
                } else {
                    floor::split(isa, h, l, m, v, g);
                }
            });
        }
    }
    black_box(&mut *state);
    start.elapsed().as_secs_f64()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next().and_then(|_| arguments.next())
}

fn number(name: &str, default: usize) -> usize {
    option(name).map_or(default, |text| {
        text.replace('_', "").parse().expect("a number")
    })
}

#[expect(clippy::print_stdout, reason = "the result is the purpose")]
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn main() {
    let params = number("--params", 100_000_000);
    let threads = number("--threads", 2);
    let repetitions = number("--repetitions", 15);
    let isa = option("--isa").map_or_else(isa, |name| {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .expect("baseline, avx2 or avx512")
    });
    let pool = Pool::new(threads).expect("threads");
    let step = Optimizer::from(AdamParams::default()).prepare(10, 0.5);
    let mut state = State::new(params);

    if let Some(format) = option("--once") {
        let kind = if format == "split" {
            Run::StepSplit
        } else {
            Run::StepFp32
        };
        run(kind, &pool, isa, &step, &mut state);
        return;
    }

    let mut report = Vec::new();
    for (format, bytes, floor, step_run) in [
        ("fp32", 28.0, Run::FloorFp32, Run::StepFp32),
        ("split", 26.0, Run::FloorSplit, Run::StepSplit),
    ] {
        let mut time = |kind| run(kind, &pool, isa, &step, &mut state);
        // Each step stands between two floors; the first round warms up. (The floors change only the low
        // half of each fp32 value: the steps keep working on ordinary numbers.)
        let rounds: Vec<[f64; 3]> = (0..=repetitions)
            .map(|_| [time(floor), time(step_run), time(floor)])
            .skip(1)
            .collect();
        let mut floors: Vec<f64> = rounds
            .iter()
            .flat_map(|&[before, _, after]| [before, after])
            .collect();
        let mut steps: Vec<f64> = rounds.iter().map(|round| round[1]).collect();
        let mut ratios: Vec<f64> = rounds
            .iter()
            .map(|&[before, step, after]| f64::midpoint(before, after) / step)
            .collect();
        let (floor_median, step_median) = (median(&mut floors), median(&mut steps));
        let speed = |seconds: f64| bytes * params as f64 / seconds / 1e9;
        report.push(format!(
            "\"{format}\":{{\"bytes_per_param\":{bytes},\"floor_s\":{floor_median:.6},\"step_s\":{step_median:.6},\
             \"floor_gb_s\":{:.2},\"step_gb_s\":{:.2},\"floor_min_s\":{:.6},\"step_min_s\":{:.6},\
             \"ratio_median\":{:.4},\"ratio_min\":{:.4}}}",
            speed(floor_median), speed(step_median), floors[0], steps[0],
            median(&mut ratios), floors[0] / steps[0],
        ));
    }
    println!(
        "{{\"bench\":\"adam\",\"params\":{params},\"threads\":{threads},\"isa\":\"{}\",\"repetitions\":{repetitions},{}}}",
        isa.name(),
        report.join(",")
    );
}
