//! Ranks as threads of one process, each with a core of its own, and what one plain pass over everything makes of the
//! same gradients.

mod board;
mod gathering;
mod oracle;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use zeroxide_layout::{Dtype, Format, ParamShape};
use zeroxide_offload::{
    GradientHome, Mesh, MeshPosition, Offload, Quantisation, SegmentHandle, Settings, StateHome,
    Transport, UnitSpec, WeightHome,
};
use zeroxide_optim::Grad;
use zeroxide_storage::{EngineKind, SimOptions};

use board::Board;
use oracle::{empty, gradient, has_gradient, hyperparameters, initial};
#[allow(unused_imports, reason = "each test file uses a part of it")]
pub(crate) use oracle::{live_of, reference};

pub(crate) const STEPS: u64 = 5;
const MICRO: u64 = 2;
const SCALE: f64 = 0.5;
/// After this, a rank that still waits counts as hung.
const PATIENCE: Duration = Duration::from_secs(20);
const PARTS: [&str; 3] = ["weight", "exp_avg", "exp_avg_sq"];

/// Elements of each parameter of each unit; the third unit is frozen. The sizes let shards end inside parameters, hold
/// several tiles, and be nothing but padding on the last ranks. Unit 0 takes gradients all through backward.
const UNITS: [&[u64]; 5] = [&[5000, 77], &[9000, 1, 64, 700], &[3001], &[20_000], &[100]];
const FROZEN: usize = 2;

/// One way of running.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) world: usize,
    pub(crate) transport: Transport,
    /// Ranks in a shard group: `world` for plain sharding, 1 where every rank keeps everything.
    pub(crate) shards: usize,
    pub(crate) weights: WeightHome,
    pub(crate) state: StateHome,
    pub(crate) gradients: GradientHome,
    pub(crate) format: Format,
    pub(crate) tile_elements: u64,
    pub(crate) threads: usize,
    pub(crate) engine: EngineKind,
}

/// fp32 values of every parameter, by (unit, parameter): weights and both moments.
pub(crate) type Values = HashMap<(usize, usize), [Vec<f32>; 3]>;

/// What all ranks together come to.
pub(crate) struct Outcome {
    pub(crate) values: Values,
    /// Live weights as each rank sees them under its windows, in units and parameters.
    pub(crate) live: Vec<Vec<u16>>,
    /// Sums of squares of the gradient, by step.
    pub(crate) norms: Vec<f64>,
}

impl Case {
    fn open(&self, rank: usize, directory: &TempDir) -> Offload {
        let units: Vec<UnitSpec> = UNITS
            .iter()
            .enumerate()
            .map(|(unit, params)| UnitSpec {
                mesh: None,
                name: format!("unit {unit}"),
                held_through_backward: unit == 0,
                params: params
                    .iter()
                    .map(|numel| ParamShape {
                        numel: *numel,
                        trainable: unit != FROZEN,
                    })
                    .collect(),
                weights: self.weights,
                state: self.state,
                gradients: self.gradients,
                optimizer: hyperparameters(),
                format: self.format,
                streams: (0..params.len() as u64)
                    .map(|param| unit as u64 * 100 + param)
                    .collect(),
            })
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "a few ranks")]
        let reduce_scale = 1.0 / self.world as f32;
        let settings = Settings {
            mesh: MeshPosition {
                groups: Mesh {
                    rank: u32::try_from(rank).expect("few"),
                    shards: u32::try_from(self.shards).expect("few"),
                    replicas: u32::try_from(self.replicas()).expect("few"),
                },
                transport: self.transport,
            },
            comm_dtype: Dtype::F32,
            quantisation: Quantisation::default(),
            reduce_scale,
            defers_steps: false,
            limit: None,
            threads: self.threads,
            compute: Dtype::Bf16,
            grad: Dtype::F32,
            tile_elements: self.tile_elements,
            staging_bytes: 4 << 20,
            gathered_bytes: 6 << 20,
            engine: self.engine_of(rank),
            queue_depth: 8,
            directories: vec![directory.path().to_path_buf()],
            shares: Vec::new(),
            job: format!("rank {rank}"),
            speculates: false,
            durable: None,
        };
        Offload::new(&settings, &units).expect("nothing in the way")
    }

    pub(crate) fn replicas(&self) -> usize {
        self.world / self.shards
    }

    /// The ranks that answer for the slices of a unit, in the order of the slices.
    fn owners(&self) -> impl Iterator<Item = usize> {
        let (shards, replicas) = (self.shards, self.replicas());
        (0..self.world).map(move |slice| slice % replicas * shards + slice / replicas)
    }

    /// Each rank's simulated disk has its own times.
    fn engine_of(&self, rank: usize) -> EngineKind {
        match &self.engine {
            EngineKind::Simulated(options) => EngineKind::Simulated(SimOptions {
                seed: options.seed * 10 + rank as u64,
                ..options.clone()
            }),
            other => other.clone(),
        }
    }

    /// Trains on all ranks at once.
    pub(crate) fn run(&self) -> Outcome {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let cores: Vec<Offload> = (0..self.world)
            .map(|rank| self.open(rank, &directory))
            .collect();
        let board = Board::new(self.world);
        let done = AtomicBool::new(false);
        let rows = thread::scope(|scope| {
            let watchdog = scope.spawn(|| {
                thread::park_timeout(PATIENCE);
                if !done.load(Ordering::Acquire) {
                    for core in &cores {
                        core.cancel("a rank hangs".into(), Vec::new());
                    }
                }
            });
            let ranks: Vec<_> = cores
                .iter()
                .enumerate()
                .map(|(rank, core)| {
                    let board = &board;
                    scope.spawn(move || {
                        let runner = Runner {
                            case: self,
                            rank,
                            core,
                            board,
                            gathers: RefCell::default(),
                        };
                        runner.run()
                    })
                })
                .collect();
            let rows: Vec<_> = ranks
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect();
            done.store(true, Ordering::Release);
            watchdog.thread().unpark();
            rows
        });
        let mut outcome = Outcome {
            values: empty(),
            live: Vec::new(),
            norms: Vec::new(),
        };
        let mut covered = 0;
        for row in rows {
            let row = row.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for (unit, param, start, values) in row.pieces {
                covered += values[0].len();
                let target = outcome
                    .values
                    .get_mut(&(unit, param))
                    .expect("all are there");
                for (target, values) in target.iter_mut().zip(values) {
                    target[start..start + values.len()].copy_from_slice(&values);
                }
            }
            outcome.live.push(row.live);
            assert!(
                outcome.norms.is_empty() || outcome.norms == row.norms,
                "ranks agree"
            );
            outcome.norms = row.norms;
        }
        let elements: u64 = UNITS.iter().flat_map(|params| params.iter()).sum();
        assert_eq!(
            covered as u64, elements,
            "each element is saved by one rank"
        );
        for core in &cores {
            core.close(&[]).expect("nothing in the way");
        }
        let left = directory.path().read_dir().expect("exists").count();
        assert_eq!(left, 0, "scratch files are removed");
        outcome
    }
}

/// One rank at work.
struct Runner<'a> {
    case: &'a Case,
    rank: usize,
    core: &'a Offload,
    board: &'a Board,
    /// How often each unit was gathered.
    gathers: RefCell<[usize; UNITS.len()]>,
}

/// What one rank has to show: runs of parameters in its shard with their values, its live weights, the norms.
struct Row {
    pieces: Vec<(usize, usize, usize, [Vec<f32>; 3])>,
    live: Vec<u16>,
    norms: Vec<f64>,
}

impl Runner<'_> {
    fn run(&self) -> Row {
        self.connect_and_fill();
        let norms = (0..STEPS).map(|step| self.step(step)).collect();
        // Gathering waits until the other ranks have updated their parts.
        let live = self.live();
        let mut pieces = Vec::new();
        for unit in 0..UNITS.len() {
            for (param, start, count) in self.core.pieces(unit).expect("a unit") {
                let values = PARTS.map(|part| {
                    let mut values = vec![0.0; usize::try_from(count).expect("small")];
                    self.core
                        .read_param(unit, param, part, start, &mut values)
                        .expect("own elements");
                    values
                });
                let start = usize::try_from(start).expect("small");
                pieces.push((unit, param, start, values));
            }
        }
        self.meet();
        Row {
            pieces,
            live,
            norms,
        }
    }

    fn connect_and_fill(&self) {
        if self.case.world > 1 && self.case.transport == Transport::Shared {
            let segment_handle = self.core.segment_handle().expect("open").expect("shared");
            let shown = segment_handle.descriptor.to_ne_bytes().to_vec();
            let handles: Vec<SegmentHandle> = self
                .board
                .swap(self.rank, shown)
                .into_iter()
                .map(|bytes| SegmentHandle {
                    pid: segment_handle.pid,
                    descriptor: i32::from_ne_bytes(bytes.try_into().expect("four bytes")),
                })
                .collect();
            self.core.join(&handles).expect("all are of this process");
        }
        for (unit, params) in UNITS.iter().enumerate() {
            self.core.fill_begin(unit, "weight").expect("idle");
            for (param, numel) in params.iter().enumerate() {
                // In two parts, since a checkpoint comes in parts.
                let values = initial(unit, param, *numel);
                let half = values.len() / 2;
                for (start, part) in [(0, &values[..half]), (half, &values[half..])] {
                    self.core
                        .fill_param(unit, param, start as u64, part)
                        .expect("fits");
                }
            }
            self.core.fill_commit(unit).expect("begun");
        }
        self.meet();
    }

    fn meet(&self) {
        self.board.swap(self.rank, Vec::new());
    }

    /// The order in which this rank's modules run. Through shared memory ranks may differ.
    fn order(&self, step: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..UNITS.len()).collect();
        if self.case.transport == Transport::Shared && !self.moves_weights() {
            let by = usize::try_from(step).expect("few") + self.rank;
            order.rotate_left(by % UNITS.len());
        }
        order
    }

    /// Whether gathering needs the caller's collectives, which all ranks call in one order.
    fn moves_weights(&self) -> bool {
        self.case.shards > 1
            && (self.case.transport == Transport::Collective
                || self.case.weights != WeightHome::Host)
    }

    /// Forward, backward and the update; returns the sum of squares over all ranks.
    fn step(&self, step: u64) -> f64 {
        for micro in 0..MICRO {
            let order = self.order(step);
            for (at, unit) in order.iter().enumerate() {
                if at == 0 || !self.moves_weights() {
                    self.gather(*unit);
                } else {
                    let whole = self
                        .core
                        .gather(*unit, false)
                        .expect("held since it was gathered ahead");
                    assert!(whole, "unit {unit} was gathered ahead");
                }
                if let Some(next) = order.get(at + 1).filter(|_| self.moves_weights()) {
                    self.gather_ahead(*next);
                }
                self.core.release(*unit).expect("gathered");
            }
            self.backward(step, micro);
        }
        let norm = self.core.grad_norm().expect("usable");
        assert!(!norm.nonfinite);
        let mut shown = norm.sum_squares.to_ne_bytes().to_vec();
        shown.extend(
            self.core
                .accumulated()
                .expect("usable")
                .into_iter()
                .map(u8::from),
        );
        self.core.finish().expect("nothing in the way");
        let all = self.board.swap(self.rank, shown);
        let accumulated: Vec<bool> = (8..all[0].len())
            .map(|at| all.iter().any(|row| row[at] > 0))
            .collect();
        self.core.set_accumulated(&accumulated).expect("as many");
        for unit in (0..UNITS.len()).filter(|unit| (*unit as u64 + step).is_multiple_of(2)) {
            self.core.cover(unit).expect("nobody uses it");
        }
        self.core.step(&[hyperparameters()], SCALE).expect("works");
        let mut total = 0.0;
        for rank in self.case.owners() {
            total += f64::from_ne_bytes(all[rank][..8].try_into().expect("eight bytes"));
        }
        total
    }

    fn backward(&self, step: u64, micro: u64) {
        let trained = |unit: &usize| *unit != FROZEN;
        let order = self.order(step);
        let mut waiting = Vec::new();
        for unit in order.into_iter().rev().filter(trained) {
            self.gather(unit);
            for (param, numel) in UNITS[unit].iter().enumerate() {
                if has_gradient(self.rank, step, micro, unit, param) {
                    let grad = gradient(self.rank, step, micro, unit, param, *numel);
                    // In two parts, as a large layer's gradient comes.
                    let half = grad.len() / 2;
                    let accumulate = |start: usize, part: &[f32]| {
                        self.core
                            .accumulate(unit, param, start as u64, Grad::F32(part), true)
                            .expect("expected next");
                    };
                    accumulate(0, &grad[..half]);
                    if half < grad.len() {
                        accumulate(half, &grad[half..]);
                    }
                }
            }
            self.core.release(unit).expect("gathered");
            // Gradients of the unit that is used all along are complete at the end.
            if unit != 0 {
                self.send(unit, &mut waiting);
            }
        }
        self.send(0, &mut waiting);
        if self.case.world == 1 {
            return;
        }
        for unit in waiting {
            assert!(self.core.receive(unit, true).expect("not cancelled"));
        }
    }

    fn send(&self, unit: usize, waiting: &mut Vec<usize>) {
        if self.case.world == 1 {
            return;
        }
        self.core.send(unit).expect("once a backward");
        if self.case.transport == Transport::Shared {
            waiting.push(unit);
            waiting.retain(|unit| !self.core.receive(*unit, false).expect("not cancelled"));
            return;
        }
        let (address, bytes) = self.core.outgoing(unit).expect("sent");
        let sent = peek(address, bytes);
        let all = self.board.swap(self.rank, sent);
        let own = if self.case.shards == 1 {
            0..bytes
        } else {
            let (start, end) = self.core.shard(unit).expect("a unit");
            let byte = |element: u64| usize::try_from(element).expect("small") * size_of::<f32>();
            let slice = byte(end - start) / self.case.replicas();
            let first = byte(start) + slice * (self.rank / self.case.shards);
            first..first + slice
        };
        let (mut at, room) = self.core.incoming(unit).expect("sent");
        let end = at + room;
        for (_, sent) in all
            .iter()
            .enumerate()
            .filter(|(rank, _)| *rank != self.rank)
        {
            poke(at, &sent[own.clone()]);
            at += own.len();
        }
        assert_eq!(at, end, "room for what comes in");
        self.core.receive_from(unit).expect("sent and received");
        if self.case.shards > 1 && self.case.replicas() > 1 {
            self.bring_sums(unit);
        }
    }

    fn live(&self) -> Vec<u16> {
        let mut live = Vec::new();
        for (unit, params) in UNITS.iter().enumerate() {
            self.gather(unit);
            let (address, _, _anchor) = self.core.window(unit).expect("a unit").expect("a window");
            for (param, numel) in params.iter().enumerate() {
                let offset = self.core.param_offset(unit, param).expect("a parameter");
                let byte = |element: u64| usize::try_from(element).expect("small") * 2;
                let bytes = peek(address + byte(offset), byte(*numel));
                live.extend(
                    bytes
                        .chunks(2)
                        .map(|pair| u16::from_ne_bytes([pair[0], pair[1]])),
                );
            }
            self.core.release(unit).expect("gathered");
        }
        live
    }
}

#[expect(
    unsafe_code,
    reason = "the window of a gathered unit, as Python sees it"
)]
pub(crate) fn peek(address: usize, bytes: usize) -> Vec<u8> {
    // SAFETY: the core has just said that this range is readable, and nothing writes it before this returns.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), bytes) }
        .to_vec()
}

#[expect(
    unsafe_code,
    reason = "the window of a gathered unit, as a collective fills it"
)]
fn poke(address: usize, bytes: &[u8]) {
    let target = std::ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: the range lies in the window of a unit that is gathered, outside of this rank's part of it.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
}
