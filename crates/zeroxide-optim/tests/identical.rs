//! The bits do not depend on the instruction set, the thread count, where slices begin and end, or which of
//! the two exact formats holds the state.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is rounded on purpose"
)]

mod kernels;
mod random;

use kernels::{AdamStep, LowOut, step_fp32_with, step_split_with};
use random::Random;
use zeroxide_optim::{
    AdamParams, Grad, Isa, Pool, bf16_half_up, f16_nearest_even, f16_to_f32, join, split,
};

const LEN: usize = 3001;

#[derive(Clone)]
struct State {
    master: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    grad: Vec<f32>,
    low_grad: Vec<u16>,
    out: Vec<u16>,
}

type Bits = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u16>);

impl State {
    /// Ordinary values with every kind of special one among them.
    fn new(seed: u64, len: usize) -> Self {
        const SPECIAL: [u32; 12] = [
            0,
            0x8000_0000,
            1,
            0x807f_ffff,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffc0_0001,
            0x7fff_ffff,
            0x0080_0000,
        ];
        let mut random = Random::new(seed);
        let mut value = |size: f64| {
            if random.below(16) == 0 {
                f32::from_bits(SPECIAL[random.below(SPECIAL.len())])
            } else {
                (size * random.normal()) as f32
            }
        };
        let master: Vec<f32> = (0..len).map(|_| value(0.02)).collect();
        let exp_avg = (0..len).map(|_| value(1e-3)).collect();
        let exp_avg_sq = (0..len)
            .map(|_| value(1e-3))
            .map(|root| if root.abs() < 1.0 { root * root } else { root })
            .collect();
        let grad: Vec<f32> = (0..len).map(|_| value(1e-3)).collect();
        let low_grad = grad
            .iter()
            .map(|value| (value.to_bits() >> 16) as u16)
            .collect();
        Self {
            out: master.iter().map(|p| bf16_half_up(*p)).collect(),
            master,
            exp_avg,
            exp_avg_sq,
            grad,
            low_grad,
        }
    }

    fn bits(&self) -> Bits {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
        (
            bits(&self.master),
            bits(&self.exp_avg),
            bits(&self.exp_avg_sq),
            self.out.clone(),
        )
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    Bf16,
    F16,
}

fn grad(kind: Kind, full: &[f32], low: &[u16], run: impl FnOnce(Grad<'_>)) {
    match kind {
        Kind::F32 => run(Grad::F32(full)),
        Kind::Bf16 => run(Grad::Bf16(low)),
        Kind::F16 => run(Grad::F16(low)),
    }
}

/// Cuts the state at `cuts` and steps each piece by itself.
fn fp32(isa: Isa, step: &AdamStep, kind: Kind, start: &State, cuts: &[usize], out: Kind) -> State {
    let mut state = start.clone();
    if let Kind::F16 = out {
        state.out = state.master.iter().map(|p| f16_nearest_even(*p)).collect();
    }
    for window in cuts.windows(2) {
        let range = window[0]..window[1];
        let low_out = &mut state.out[range.clone()];
        let low_out = match out {
            Kind::F32 => LowOut::None,
            Kind::Bf16 => LowOut::Bf16(low_out),
            Kind::F16 => LowOut::F16(low_out),
        };
        grad(
            kind,
            &state.grad[range.clone()],
            &state.low_grad[range.clone()],
            |grad| {
                step_fp32_with(
                    isa,
                    step,
                    &mut state.master[range.clone()],
                    &mut state.exp_avg[range.clone()],
                    &mut state.exp_avg_sq[range.clone()],
                    grad,
                    low_out,
                );
            },
        );
    }
    state
}

fn steps() -> Vec<AdamStep> {
    let adamw = AdamParams::default();
    let adam = AdamParams {
        decoupled: false,
        ..adamw
    };
    let bare = AdamParams {
        eps: 0.0,
        weight_decay: 0.0,
        bias_correction: false,
        ..adamw
    };
    vec![
        AdamStep::new(&adamw, 1, 1.0),
        AdamStep::new(&adam, 9, 0.37),
        AdamStep::new(&bare, 1000, 1.0 / 65536.0),
    ]
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let start = State::new(1, LEN);
    let supported: Vec<Isa> = Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_supported())
        .collect();
    eprintln!("comparing {supported:?}");
    for step in steps() {
        for kind in [Kind::F32, Kind::Bf16, Kind::F16] {
            for out in [Kind::F32, Kind::Bf16, Kind::F16] {
                let expected = fp32(Isa::Baseline, &step, kind, &start, &[0, LEN], out).bits();
                for &isa in &supported {
                    let got = fp32(isa, &step, kind, &start, &[0, LEN], out).bits();
                    assert!(
                        got == expected,
                        "{isa:?} {kind:?} {out:?}: {}",
                        first_difference(&got, &expected)
                    );
                }
            }
        }
    }
}

fn first_difference(got: &Bits, expected: &Bits) -> String {
    for (name, got, expected) in [
        ("weight", &got.0, &expected.0),
        ("exp_avg", &got.1, &expected.1),
        ("exp_avg_sq", &got.2, &expected.2),
    ] {
        if let Some(index) = (0..got.len()).find(|&index| got[index] != expected[index]) {
            return format!(
                "{name}[{index}] is {:#x}, expected {:#x}",
                got[index], expected[index]
            );
        }
    }
    "out".into()
}

#[test]
fn slice_boundaries_do_not_show() {
    let start = State::new(2, LEN);
    let mut random = Random::new(3);
    for step in steps() {
        let whole = fp32(
            zeroxide_optim::isa(),
            &step,
            Kind::Bf16,
            &start,
            &[0, LEN],
            Kind::Bf16,
        )
        .bits();
        for _ in 0..20 {
            let mut cuts: Vec<usize> = (0..random.below(12)).map(|_| random.below(LEN)).collect();
            cuts.extend([0, LEN]);
            cuts.sort_unstable();
            let pieces = fp32(
                zeroxide_optim::isa(),
                &step,
                Kind::Bf16,
                &start,
                &cuts,
                Kind::Bf16,
            );
            assert!(pieces.bits() == whole, "cut at {cuts:?}");
        }
    }
}

#[test]
fn thread_count_does_not_show() {
    let start = State::new(4, LEN);
    let step = steps()[0];
    let run = |threads: usize, tile: usize| {
        let pool = Pool::new(threads).expect("threads");
        let mut state = start.clone();
        let State {
            master,
            exp_avg,
            exp_avg_sq,
            low_grad,
            out,
            ..
        } = &mut state;
        let moments = exp_avg.chunks_mut(tile).zip(exp_avg_sq.chunks_mut(tile));
        let low = low_grad.chunks(tile).zip(out.chunks_mut(tile));
        pool.run_each(
            master.chunks_mut(tile).zip(moments).zip(low).collect(),
            |_, ((p, (m, v)), (g, o))| {
                step_fp32_with(
                    zeroxide_optim::isa(),
                    &step,
                    p,
                    m,
                    v,
                    Grad::Bf16(g),
                    LowOut::Bf16(o),
                );
            },
        );
        state.bits()
    };
    let alone = run(1, LEN);
    for (threads, tile) in [(2, 64), (3, 100), (7, 1)] {
        assert!(
            run(threads, tile) == alone,
            "{threads} threads, tiles of {tile}"
        );
    }
}

#[test]
fn both_formats_give_the_same_bits_over_many_steps() {
    for params in [
        AdamParams::default(),
        AdamParams {
            decoupled: false,
            lr: 0.1,
            ..AdamParams::default()
        },
    ] {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let mut fp32 = State::new(5, LEN);
            let (mut high, mut low): (Vec<u16>, Vec<u16>) =
                fp32.master.iter().map(|&master| split(master)).unzip();
            let (mut exp_avg, mut exp_avg_sq) = (fp32.exp_avg.clone(), fp32.exp_avg_sq.clone());
            for step in 1..=5 {
                let step = AdamStep::new(&params, step, 0.7);
                let grad = Grad::Bf16(&fp32.low_grad);
                step_split_with(
                    isa,
                    &step,
                    &mut high,
                    &mut low,
                    &mut exp_avg,
                    &mut exp_avg_sq,
                    grad,
                );
                step_fp32_with(
                    isa,
                    &step,
                    &mut fp32.master,
                    &mut fp32.exp_avg,
                    &mut fp32.exp_avg_sq,
                    grad,
                    LowOut::Bf16(&mut fp32.out),
                );
                let master = high
                    .iter()
                    .zip(&low)
                    .map(|(&high, &low)| join(high, low))
                    .collect();
                let as_fp32 = State {
                    master,
                    exp_avg: exp_avg.clone(),
                    exp_avg_sq: exp_avg_sq.clone(),
                    out: high.clone(),
                    ..fp32.clone()
                };
                assert!(
                    as_fp32.bits() == fp32.bits(),
                    "{isa:?}: {}",
                    first_difference(&as_fp32.bits(), &fp32.bits())
                );
            }
        }
    }
}

/// Live weights that anything may have been written into: every bf16 comes up.
fn edited(high: &[u16], random: &mut Random) -> Vec<u16> {
    high.iter()
        .map(|&old| match random.below(4) {
            0 => 0,
            1 => 0x8000,
            2 => random.bits() as u16,
            _ => old,
        })
        .collect()
}

#[test]
fn both_formats_take_edited_weights_for_the_same_master() {
    let mut random = Random::new(8);
    for step in steps() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let mut start = State::new(9, LEN);
            for master in start.master.iter_mut().filter(|master| master.is_nan()) {
                *master = f32::NAN;
            }
            let (high, mut low): (Vec<u16>, Vec<u16>) =
                start.master.iter().map(|&master| split(master)).unzip();
            let live = edited(&high, &mut random);
            let mut high = live.clone();
            let (mut exp_avg, mut exp_avg_sq) = (start.exp_avg.clone(), start.exp_avg_sq.clone());
            let grad = Grad::Bf16(&start.low_grad);
            step_split_with(
                isa,
                &step,
                &mut high,
                &mut low,
                &mut exp_avg,
                &mut exp_avg_sq,
                grad,
            );
            let started = State {
                out: live.clone(),
                ..start.clone()
            };
            let got = fp32(isa, &step, Kind::Bf16, &started, &[0, LEN], Kind::Bf16);
            // And both are one step of the edited value itself, which stands in a master of its own.
            let plain = State {
                master: start
                    .master
                    .iter()
                    .zip(&live)
                    .map(|(&master, &live)| join(live, split(master).1))
                    .collect(),
                ..start.clone()
            };
            let plain = fp32(isa, &step, Kind::Bf16, &plain, &[0, LEN], Kind::F32);
            let as_split = State {
                master: high
                    .iter()
                    .zip(&low)
                    .map(|(&high, &low)| join(high, low))
                    .collect(),
                exp_avg,
                exp_avg_sq,
                out: high,
                ..start.clone()
            };
            assert!(
                as_split.bits() == got.bits(),
                "{isa:?}: {}",
                first_difference(&as_split.bits(), &got.bits())
            );
            assert!(
                (&plain.bits().0, &plain.bits().1) == (&got.bits().0, &got.bits().1),
                "{isa:?}: {}",
                first_difference(&plain.bits(), &got.bits())
            );
        }
    }
}

#[test]
fn an_edited_fp16_weight_replaces_its_master() {
    let mut random = Random::new(10);
    for step in steps() {
        let start = State::new(11, LEN);
        let mut live: Vec<u16> = start.master.iter().map(|p| f16_nearest_even(*p)).collect();
        let mut masters = start.master.clone();
        for (live, master) in live.iter_mut().zip(&mut masters) {
            if random.below(2) == 0 {
                *live = [0, 0x8000, random.bits() as u16][random.below(3)];
                if *live != f16_nearest_even(*master) {
                    *master = f16_to_f32(*live);
                }
            }
        }
        let run = |master: &[f32], live: &[u16]| {
            let (mut master, mut out) = (master.to_vec(), live.to_vec());
            let (mut exp_avg, mut exp_avg_sq) = (start.exp_avg.clone(), start.exp_avg_sq.clone());
            step_fp32_with(
                zeroxide_optim::isa(),
                &step,
                &mut master,
                &mut exp_avg,
                &mut exp_avg_sq,
                Grad::F32(&start.grad),
                LowOut::F16(&mut out),
            );
            let bits: Vec<u32> = master.iter().map(|value| value.to_bits()).collect();
            (bits, out)
        };
        let got = run(&start.master, &live);
        let consistent: Vec<u16> = masters.iter().map(|p| f16_nearest_even(*p)).collect();
        assert!(got == run(&masters, &consistent));
    }
}

#[test]
fn the_low_weight_is_the_rounded_master() {
    let start = State::new(6, LEN);
    let after = fp32(
        zeroxide_optim::isa(),
        &steps()[0],
        Kind::F32,
        &start,
        &[0, LEN],
        Kind::Bf16,
    );
    for (master, out) in after.master.iter().zip(&after.out) {
        assert_eq!(*out, bf16_half_up(*master));
    }
}

#[test]
#[should_panic(expected = "differ in length")]
fn slices_of_different_length_are_refused() {
    let mut out = [0; 3];
    step_fp32_with(
        zeroxide_optim::isa(),
        &steps()[0],
        &mut [0.0; 4],
        &mut [0.0; 4],
        &mut [0.0; 4],
        Grad::F32(&[0.0; 4]),
        LowOut::Bf16(&mut out),
    );
}
