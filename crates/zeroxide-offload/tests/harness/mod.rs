//! A small model of three units, gradients by formula, and what one plain pass of the kernel makes of it.
#![allow(dead_code, reason = "each test file uses a part of the harness")]

pub(crate) mod rounded;

use bytemuck::cast_slice_mut;
use tempfile::TempDir;
use zeroxide_layout::{Dtype, Format, ParamShape, StateLayout};
use zeroxide_offload::{
    GradientHome, MeshPosition, Offload, OffloadError, Quantisation, Result, Settings, StateHome,
    UnitSpec, WeightHome,
};
use zeroxide_optim::{AdamParams, Grad, Optimizer, update};
use zeroxide_storage::{EngineKind, SimOptions};

pub(crate) const REFERENCE_STEPS: u64 = 4;
/// Elements of each parameter of each unit, and whether it is trained. Odd sizes, so that boundaries fall anywhere.
pub(crate) const UNITS: [&[(u64, bool)]; 3] = [
    &[(5000, true), (77, true), (3001, false)],
    &[(9000, true), (1, true), (64, true), (700, true)],
    &[(123, false), (20_000, true)],
];
pub(crate) const SCALE: f64 = 0.5;

pub(crate) struct Case {
    pub(crate) weights: WeightHome,
    pub(crate) state: StateHome,
    pub(crate) gradients: GradientHome,
    pub(crate) format: Format,
    /// Rule and format of each unit, where not all have Adam and `format`.
    pub(crate) rules: Option<[(Optimizer, Format); 3]>,
    /// Whether parameters are given random bits.
    pub(crate) streams: bool,
    pub(crate) threads: usize,
    pub(crate) tile_elements: u64,
    pub(crate) staging_bytes: u64,
    pub(crate) gathered_bytes: u64,
    pub(crate) limit: Option<u64>,
    pub(crate) engine: EngineKind,
    pub(crate) directory: TempDir,
    pub(crate) durable: bool,
    pub(crate) speculates: bool,
}

/// The random bits of a parameter.
pub(crate) fn stream(unit: usize, param: u64) -> u64 {
    (unit as u64 * 100 + param).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Default for Case {
    fn default() -> Self {
        Self {
            weights: WeightHome::Disk,
            state: StateHome::Disk,
            gradients: GradientHome::Host,
            format: Format::Split,
            rules: None,
            streams: true,
            threads: 2,
            tile_elements: 2048,
            staging_bytes: 2 << 20,
            gathered_bytes: 4 << 20,
            limit: None,
            engine: EngineKind::Auto,
            directory: tempfile::tempdir().expect("a temporary directory"),
            durable: false,
            speculates: false,
        }
    }
}

impl Case {
    /// Rule and format of a unit.
    pub(crate) fn rule(&self, unit: usize) -> (Optimizer, Format) {
        match &self.rules {
            Some(rules) => rules[unit],
            None => (hyperparameters(), self.format),
        }
    }

    pub(crate) fn try_open(&self) -> Result<Offload> {
        let units: Vec<UnitSpec> = UNITS
            .iter()
            .enumerate()
            .map(|(index, params)| UnitSpec {
                mesh: None,
                name: format!("unit {index}"),
                held_through_backward: false,
                params: params
                    .iter()
                    .map(|(numel, trainable)| ParamShape {
                        numel: *numel,
                        trainable: *trainable,
                    })
                    .collect(),
                weights: self.weights,
                state: self.state,
                gradients: self.gradients,
                optimizer: self.rule(index).0,
                format: self.rule(index).1,
                streams: (0..if self.streams { params.len() as u64 } else { 0 })
                    .map(|param| stream(index, param))
                    .collect(),
            })
            .collect();
        Offload::new(&self.settings(), &units)
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            mesh: MeshPosition::ALONE,
            comm_dtype: Dtype::F32,
            quantisation: Quantisation::default(),
            reduce_scale: 1.0,
            defers_steps: false,
            limit: self.limit,
            threads: self.threads,
            compute: Dtype::Bf16,
            grad: Dtype::F32,
            tile_elements: self.tile_elements,
            staging_bytes: self.staging_bytes,
            gathered_bytes: self.gathered_bytes,
            engine: self.engine.clone(),
            queue_depth: 8,
            directories: vec![self.directory.path().to_path_buf()],
            shares: Vec::new(),
            job: "test".into(),
            speculates: self.speculates,
            durable: self
                .durable
                .then(|| vec![("world size".into(), "1".into())]),
        }
    }

    pub(crate) fn open_filled(&self) -> Result<Offload> {
        let offload = self.try_open()?;
        for (unit, params) in UNITS.iter().enumerate() {
            offload.fill_begin(unit, "weight")?;
            for (param, (numel, _)) in params.iter().enumerate() {
                offload.fill_param(unit, param, 0, &initial(unit, param, *numel))?;
            }
            offload.fill_commit(unit)?;
        }
        Ok(offload)
    }

    pub(crate) fn open(&self) -> Offload {
        self.open_filled().expect("nothing in the way")
    }
}

/// A simulated disk without latency, changed as asked.
pub(crate) fn sim(change: impl FnOnce(&mut SimOptions)) -> EngineKind {
    let mut options = SimOptions::default();
    change(&mut options);
    EngineKind::Simulated(options)
}

pub(crate) fn run(case: &Case, steps: u64) -> Result<Offload> {
    let offload = case.open_filled()?;
    for index in 0..steps {
        step(&offload, index)?;
    }
    Ok(offload)
}

/// One training step as an engine makes it: forward over the units, backward in the other order, update.
pub(crate) fn step(offload: &Offload, step: u64) -> Result<()> {
    backward(offload, step)?;
    offload.step(&[hyperparameters()], SCALE)
}

/// All of a training step but the update.
pub(crate) fn backward(offload: &Offload, step: u64) -> Result<()> {
    for unit in 0..UNITS.len() {
        offload.gather(unit, false)?;
        offload.prefetch((unit + 1) % UNITS.len())?;
        offload.release(unit)?;
    }
    for (unit, params) in UNITS.iter().enumerate().rev() {
        offload.gather(unit, false)?;
        for (param, (numel, trainable)) in params.iter().enumerate() {
            if *trainable && !is_unused(step, unit, param) {
                offload.accumulate(
                    unit,
                    param,
                    0,
                    Grad::F32(&gradient(step, unit, param, *numel)),
                    true,
                )?;
            }
        }
        offload.release(unit)?;
    }
    Ok(())
}

/// Master weights of every parameter, in order.
pub(crate) fn master(offload: &Offload) -> Vec<u32> {
    try_master(offload).expect("nothing in the way")
}

pub(crate) fn try_master(offload: &Offload) -> std::result::Result<Vec<u32>, OffloadError> {
    let mut all = Vec::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for (param, (numel, _)) in params.iter().enumerate() {
            let mut values = vec![0.0_f32; usize::try_from(*numel).expect("small")];
            offload.read_param(unit, param, "weight", 0, &mut values)?;
            all.extend(values.iter().map(|value| value.to_bits()));
        }
    }
    Ok(all)
}

/// What [`REFERENCE_STEPS`] steps make of the initial weights, by one kernel call a parameter and step.
pub(crate) fn reference() -> Vec<u32> {
    let mut all = Vec::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for (param, (numel, trainable)) in params.iter().enumerate() {
            let weight = if *trainable {
                plain(&hyperparameters(), unit, param, *numel).swap_remove(0)
            } else {
                // Frozen weights are kept in the compute dtype.
                let live =
                    |value: &f32| zeroxide_optim::bf16_to_f32(zeroxide_optim::bf16_half_up(*value));
                initial(unit, param, *numel).iter().map(live).collect()
            };
            all.extend(weight.iter().map(|value| value.to_bits()));
        }
    }
    all
}

/// Weight and moments of one parameter after [`REFERENCE_STEPS`] steps, by one kernel call a step over fp32 values.
pub(crate) fn plain(optimizer: &Optimizer, unit: usize, param: usize, numel: u64) -> Vec<Vec<f32>> {
    let moments = optimizer.moments();
    let layout = StateLayout::new(Dtype::F32, Format::Fp32, &moments).expect("they go together");
    let mut values = vec![initial(unit, param, numel)];
    for moment in &moments {
        values.push(vec![moment.initial; values[0].len()]);
    }
    let mut updates = 0;
    for step in (0..REFERENCE_STEPS).filter(|step| !is_unused(*step, unit, param)) {
        updates += 1;
        let grad = gradient(step, unit, param, numel);
        let tensors = values.iter_mut().map(|tensor| cast_slice_mut(tensor));
        update(
            &optimizer.prepare(updates, SCALE),
            &layout,
            tensors,
            Grad::F32(&grad),
        );
    }
    values
}

/// One parameter has no gradient in every other step.
pub(crate) fn is_unused(step: u64, unit: usize, param: usize) -> bool {
    (unit, param) == (1, 2) && step % 2 == 1
}

pub(crate) fn hyperparameters() -> Optimizer {
    Optimizer::from(AdamParams {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        bias_correction: true,
    })
}

pub(crate) fn initial(unit: usize, param: usize, numel: u64) -> Vec<f32> {
    noise(unit as u64 * 31 + param as u64 + 1000, numel)
}

pub(crate) fn gradient(step: u64, unit: usize, param: usize, numel: u64) -> Vec<f32> {
    noise(step * 1009 + unit as u64 * 31 + param as u64, numel)
}

#[expect(clippy::cast_precision_loss, reason = "24 bits fit")]
/// Values in (-1, 1) by Weyl's sequence: no dependency, no two alike.
fn noise(seed: u64, numel: u64) -> Vec<f32> {
    (0..numel)
        .map(|index| {
            let mixed = (index + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(seed.wrapping_mul(0xd1b5_4a32_d192_ed03));
            ((mixed >> 40) as f32 / (1_u64 << 23) as f32) - 1.0
        })
        .collect()
}
