//! What a training step exchanges with the other ranks and with the disk, found from the plan alone: nothing is allocated or sent.
//!
//! So a job of a thousand ranks can be looked at on one machine before it is started. The rules are those of the gatherer
//! and of the core: the order of the last pass says what is gathered ahead, and of the units in memory that nobody uses
//! the one used longest ago goes first. The part of the hooks is played here: forward gathers the units in order, backward
//! in reverse, and each trainable unit is reduced once.

mod collective;
mod frames;
mod order;

use std::collections::VecDeque;

use crate::home::{Transport, WeightHome};
use crate::mesh::Mesh;
use crate::plan::Plan;
use crate::quantisation::{gradient_message, weight_message};
use crate::unit::PlacedUnit;

use frames::Frames;
use order::GatherOrder;

pub use collective::{Collective, CollectiveKind, Phase};

/// Steps after which the order is known, and what is in memory is what every step leaves.
const STEPS_UNTIL_STEADY: usize = 2;

/// A forward or a backward of one micro-batch. Each backward reduces all units, also those that it does not use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Whether it goes back.
    pub backward: bool,
    /// The units that it uses, in any order; none stands for all.
    pub units: Vec<usize>,
}

impl Pass {
    fn uses(&self, turn: &[usize]) -> bool {
        self.units.is_empty() || turn.iter().any(|index| self.units.contains(index))
    }
}

/// Forward and backward of one micro-batch through all units.
fn one_micro_batch() -> [Pass; 2] {
    [false, true].map(|backward| Pass {
        backward,
        units: Vec::new(),
    })
}

/// What a step exchanges, when every module of the model runs once in a forward. Activation checkpointing changes nothing
/// here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// The collectives, in the order in which a rank begins them. Between ranks of one host that share memory there are none
    /// but the gathers of weights at home on disk.
    pub collectives: Vec<Collective>,
    /// Bytes of gradients that leave a rank through shared memory.
    pub shared_bytes: u64,
    /// Those of them that leave its shard group.
    pub shared_across: u64,
    /// Bytes read from disk: the state for its update, and weights that are not in memory when they are needed. What the
    /// next forward needs is read once, for its update.
    pub read_bytes: u64,
    /// Bytes written to disk.
    pub written_bytes: u64,
}

impl Schedule {
    /// Plays the third step of training, of one micro-batch.
    pub fn new(plan: &Plan) -> Self {
        Self::of(plan, &one_micro_batch())
    }

    /// Plays the third step of training, in which the rank goes through `passes` in their order.
    pub fn of(plan: &Plan, passes: &[Pass]) -> Self {
        let mut rank = Rank::new(plan);
        // What the steps before leave in memory, and their order, are part of the answer.
        for _ in 0..=STEPS_UNTIL_STEADY {
            rank.step(passes);
        }
        let backwards = passes.iter().filter(|pass| pass.backward).count() as u64;
        let placement = &plan.placement;
        let alone = placement.mesh.world() == 1;
        let outgoing = |unit: &PlacedUnit| match placement.transport {
            Transport::Shared if !alone => unit.outgoing_bytes(placement.dtypes.comm),
            _ => 0,
        };
        let shared_bytes = backwards * placement.units.iter().map(outgoing).sum::<u64>();
        let (state_read, written_bytes) = placement.update_traffic();
        let mesh = placement.mesh;
        // Each other rank reads what it keeps.
        let each = shared_bytes / u64::from(mesh.shards);
        Self {
            collectives: if alone { Vec::new() } else { rank.begun },
            shared_bytes: each * u64::from(mesh.world() - 1),
            shared_across: each * strangers(mesh),
            read_bytes: state_read + rank.frames.read_bytes(),
            written_bytes,
        }
    }

    /// Bytes that leave a rank, whatever carries them.
    pub fn sent_bytes(&self) -> u64 {
        self.shared_bytes + self.collectives.iter().map(|each| each.sent).sum::<u64>()
    }

    /// Bytes that leave a rank's group, whatever carries them.
    pub fn across_bytes(&self) -> u64 {
        self.shared_across + self.collectives.iter().map(|each| each.across).sum::<u64>()
    }
}

/// Ranks outside of a rank's shard group; none where every rank keeps everything, and all are one group.
fn strangers(mesh: Mesh) -> u64 {
    if mesh.has_all() {
        0
    } else {
        u64::from(mesh.world() - mesh.shards)
    }
}

/// One rank's steps.
struct Rank<'a> {
    plan: &'a Plan,
    frames: Frames,
    /// Units held from their first use to the end of backward.
    held: Vec<usize>,
    order: GatherOrder,
    /// Units held for a use that is still to come, the next one first.
    ahead: VecDeque<usize>,
    /// Units in use, those gathered first at the front.
    used: Vec<usize>,
    /// Units that are held ahead of use.
    early: usize,
    phase: Phase,
    begun: Vec<Collective>,
    /// Units whose codes the rank keeps of all groups, for the present weights.
    coded: Vec<bool>,
    /// Of the units reduced last what is still to be sent, the next collective of each at the front.
    later: VecDeque<VecDeque<Collective>>,
}

impl<'a> Rank<'a> {
    fn new(plan: &'a Plan) -> Self {
        let units = &plan.placement.units;
        Self {
            plan,
            frames: Frames::new(plan),
            held: (0..units.len())
                .filter(|index| units[*index].shape.held_through_backward)
                .collect(),
            order: GatherOrder::default(),
            ahead: VecDeque::new(),
            used: Vec::new(),
            // With one rank, what comes next is read ahead and not held.
            early: if plan.weights.moves() && plan.placement.mesh.world() > 1 {
                plan.prefetch
            } else {
                0
            },
            phase: Phase::Forward,
            begun: Vec::new(),
            coded: vec![false; units.len()],
            later: VecDeque::new(),
        }
    }

    fn step(&mut self, passes: &[Pass]) {
        self.begun.clear();
        self.coded.fill(false);
        self.frames.start_step();
        let moves = self.plan.weights != WeightHome::Host;
        for pass in passes {
            if pass.backward {
                self.backward(pass, moves);
            } else if moves {
                self.forward(pass);
            }
        }
        self.frames.end_step();
        let placement = &self.plan.placement;
        let collective = placement.transport == Transport::Collective;
        if collective && !moves && !placement.mesh.replicated() {
            self.phase = Phase::Step;
            for index in 0..placement.units.len() {
                if self.is_trainable(index) {
                    self.all_gather(index);
                }
            }
        }
    }

    fn forward(&mut self, pass: &Pass) {
        self.phase = Phase::Forward;
        self.drop_ahead(|_| true);
        self.order.start();
        for index in self.held.clone() {
            self.gather(index);
        }
        for turn in self.plan.turns.iter().filter(|turn| pass.uses(turn)) {
            for index in turn {
                self.gather(*index);
            }
            for index in turn {
                self.release(*index);
            }
        }
    }

    fn backward(&mut self, pass: &Pass, moves: bool) {
        self.phase = Phase::Backward;
        for index in if moves { self.held.clone() } else { Vec::new() } {
            self.gather(index);
        }
        let plan = self.plan;
        let mut last: &[usize] = &[];
        for turn in plan.turns.iter().rev().filter(|turn| pass.uses(turn)) {
            if moves {
                for index in last {
                    self.release(*index);
                }
                for index in turn {
                    self.gather(*index);
                }
            }
            for index in turn {
                if self.is_trainable(*index) {
                    self.reduce(*index);
                }
            }
            last = turn;
        }
        if moves {
            self.release_all();
        }
        for index in self.held.clone().into_iter().rev() {
            if self.is_trainable(index) {
                self.reduce(index);
            }
        }
        // Ranks reduce what others may have a gradient of.
        for turn in plan.turns.iter().rev().filter(|turn| !pass.uses(turn)) {
            for index in turn {
                if self.is_trainable(*index) {
                    self.reduce(*index);
                }
            }
        }
        while !self.later.is_empty() {
            self.send_later();
        }
    }

    /// Uses a unit, and gathers the ones that come next.
    fn gather(&mut self, unit: usize) {
        self.order.note(unit);
        let wanted = self.wanted(unit);
        if !self.ahead.is_empty() {
            self.make_way(unit, &wanted);
        }
        self.make_room(unit);
        self.bring(unit);
        for index in wanted {
            if self.ahead.contains(&index) {
                continue;
            }
            if !self.frames.has_room(index) {
                break;
            }
            self.bring(index);
            self.ahead.push_back(index);
        }
    }

    /// The units to be held ahead: those that come next and are not in use.
    fn wanted(&self, unit: usize) -> Vec<usize> {
        let mut found = Vec::new();
        for &index in self.order.rest() {
            if found.len() == self.early {
                break;
            }
            if index != unit && !self.used.contains(&index) && !found.contains(&index) {
                found.push(index);
            }
        }
        found
    }

    /// What is held ahead and does not come next is let go, and more where the unit would have no room.
    fn make_way(&mut self, unit: usize, wanted: &[usize]) {
        self.ahead.retain(|index| *index != unit);
        self.drop_ahead(|index| !wanted.contains(&index));
        while !self.used.contains(&unit) && !self.frames.has_room(unit) {
            let Some(last) = self.ahead.pop_back() else {
                break;
            };
            self.frames.release(last);
        }
    }

    /// Ends the use of those gathered first until the unit has room, if it can have.
    fn make_room(&mut self, unit: usize) {
        if !self.used.contains(&unit) {
            while !self.frames.has_room(unit) {
                let Some(oldest) = self.used.first().copied() else {
                    break;
                };
                self.release(oldest);
            }
        }
        self.used.retain(|index| *index != unit);
        self.used.push(unit);
    }

    fn drop_ahead(&mut self, dropped: impl Fn(usize) -> bool) {
        for index in self.ahead.clone() {
            if dropped(index) {
                self.ahead.retain(|other| *other != index);
                self.frames.release(index);
            }
        }
    }

    fn release(&mut self, unit: usize) {
        self.ahead.retain(|index| *index != unit);
        self.used.retain(|index| *index != unit);
        self.frames.release(unit);
    }

    fn release_all(&mut self) {
        self.ahead.clear();
        self.used.clear();
        for index in 0..self.plan.placement.units.len() {
            self.frames.release(index);
        }
    }

    fn bring(&mut self, unit: usize) {
        if !self.frames.hold(unit) {
            self.all_gather(unit);
        }
    }

    fn is_trainable(&self, unit: usize) -> bool {
        self.plan.placement.units[unit].layout.trainable_len() > 0
    }

    fn all_gather(&mut self, unit: usize) {
        let placement = &self.plan.placement;
        let (mesh, quantisation) = (placement.units[unit].mesh, &placement.quantisation);
        if mesh.has_all() {
            return;
        }
        let len = placement.units[unit].layout.len();
        let shards = u64::from(mesh.shards);
        let begin = |kind, sent, across| Collective {
            phase: self.phase,
            kind,
            unit,
            sent,
            across,
        };
        if !quantisation.quantises(unit) {
            let part = len / shards * placement.dtypes.compute.size() as u64;
            let across = part * (shards - u64::from(mesh.shards.min(quantisation.near(mesh))));
            self.begun.push(begin(
                CollectiveKind::AllGather,
                part * (shards - 1),
                across,
            ));
            return;
        }
        let part = weight_message(len / shards);
        let far = u64::from(quantisation.far_shards(mesh));
        if far > 1 && !self.coded[unit] {
            let sent = part * (far - 1);
            self.begun
                .push(begin(CollectiveKind::AllGatherAcross, sent, sent));
        }
        let near = shards / far;
        self.begun
            .push(begin(CollectiveKind::AllGather, part * far * (near - 1), 0));
        self.coded[unit] = true;
    }

    fn reduce(&mut self, unit: usize) {
        let placement = &self.plan.placement;
        if placement.transport == Transport::Shared {
            return;
        }
        let mesh = placement.units[unit].mesh;
        if mesh.world() == 1 {
            return;
        }
        let summed = mesh.summed(placement.units[unit].local.kept);
        let begin = |kind, sent, across| Collective {
            phase: self.phase,
            kind,
            unit,
            sent,
            across,
        };
        let mut later = VecDeque::new();
        let first = if placement.quantisation.gradients {
            let part = gradient_message(
                placement.units[unit].layout.trainable_len() / u64::from(mesh.world()),
            );
            let (near, far) = (
                placement.quantisation.near(mesh),
                placement.quantisation.far(mesh),
            );
            if far > 1 {
                let sent = part * u64::from(far - 1);
                later.push_back(begin(CollectiveKind::AllToAllAcross, sent, sent));
            }
            begin(
                CollectiveKind::AllToAll,
                part * u64::from(far) * u64::from(near - 1),
                0,
            )
        } else {
            let kind = if mesh.replicated() {
                CollectiveKind::AllGatherGradients
            } else {
                CollectiveKind::AllToAll
            };
            // As many bytes leave as arrive.
            let sent = placement.units[unit].incoming_bytes(placement.dtypes.comm);
            let across = summed * placement.dtypes.comm.size() as u64 * self.strangers(unit);
            begin(kind, sent, across)
        };
        if !mesh.has_all() && mesh.replicas > 1 {
            let sent = summed * placement.dtypes.grad.size() as u64 * u64::from(mesh.replicas - 1);
            later.push_back(begin(CollectiveKind::AllGatherSums, sent, sent));
        }
        self.send_later();
        self.begun.push(first);
        if !later.is_empty() {
            self.later.push_back(later);
        }
    }

    /// Ranks outside of a rank's group, over which a reduction in one hop goes.
    fn strangers(&self, unit: usize) -> u64 {
        let placement = &self.plan.placement;
        let mesh = placement.units[unit].mesh;
        if mesh.has_all() {
            0
        } else {
            u64::from(mesh.world() - placement.quantisation.near(mesh))
        }
    }

    /// What was reduced before has been summed by now: its next hop begins, of each unit.
    fn send_later(&mut self) {
        let units = std::mem::take(&mut self.later);
        for mut unit in units {
            self.begun.extend(unit.pop_front());
            if !unit.is_empty() {
                self.later.push_back(unit);
            }
        }
    }
}
