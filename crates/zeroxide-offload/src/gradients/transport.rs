//! The connection to the other ranks: who they are, what is shared, and whose weights are how new.

use std::sync::Arc;

use zeroxide_exchange::{CancelToken, PeerWait, ReducerPlan, SegmentHandle, SharedMemoryReducer};
use zeroxide_layout::PAGE;
use zeroxide_memory::{Arena, Bucket, Budget, FRAME};
use zeroxide_plan::{PlacedUnit, Placement};

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::settings::{Settings, Transport, WeightHome};
use crate::weights::residence::{Residence, UnitWeights};

/// How gradients leave this rank.
pub(crate) enum GradientTransport {
    /// There is no other rank.
    SingleRank,
    /// Through shared memory.
    Shared {
        reducer: Box<SharedMemoryReducer>,
        /// Where each unit's weights start in the shared segment; `None` where they are not shared.
        weights: Vec<Option<usize>>,
        cancel_token: Arc<CancelToken>,
    },
    /// Carried by the caller.
    Collective {
        /// Room for what is on its way out.
        arena: Option<Arena>,
        /// Room for what comes in, of one unit at a time.
        incoming: Option<Arena>,
        cancel_token: Arc<CancelToken>,
    },
}

impl GradientTransport {
    pub(crate) fn new(budget: &Budget, settings: &Settings, placement: &Placement) -> Result<Self> {
        let mesh = settings.mesh;
        if mesh.world() == 1 {
            return Ok(Self::SingleRank);
        }
        let cancel_token = Arc::new(CancelToken::default());
        let transit = &placement.transit;
        if mesh.transport == Transport::Collective {
            let reserve = |room: u64| match to_usize(room) {
                0 => Ok(None),
                room => Arena::new(budget, Bucket::Gradients, room).map(Some),
            };
            return Ok(Self::Collective {
                arena: reserve(transit.outgoing)?,
                // What comes in as integers has a room of its own.
                incoming: reserve(if settings.quantisation.gradients {
                    0
                } else {
                    transit.incoming
                })?,
                cancel_token,
            });
        }
        let mut end = 0;
        let weights = placement
            .units
            .iter()
            .map(|unit| {
                let shared = mesh.shares_weights() && unit.shape.weights == WeightHome::Host;
                shared.then(|| {
                    let start = end;
                    let size = to_usize(unit.weight_bytes(settings.compute));
                    // Huge pages need aligned starts; what lies between is never touched.
                    end = (start + size).next_multiple_of(FRAME);
                    start
                })
            })
            .collect();
        let outgoing = |unit: &PlacedUnit| to_usize(unit.outgoing_bytes(settings.comm_dtype));
        let plan = ReducerPlan {
            units: placement.units.iter().map(outgoing).collect(),
            slots: transit.slots,
            held_through_backward: transit.reserved.clone(),
            weights: end,
            shards: mesh.groups.shards as usize,
        };
        let reducer = SharedMemoryReducer::new(
            mesh.groups.rank as usize,
            mesh.world() as usize,
            plan,
            budget,
            Arc::clone(&cancel_token),
        )?;
        Ok(Self::Shared {
            reducer: Box::new(reducer),
            weights,
            cancel_token,
        })
    }

    pub(crate) fn cancel_token(&self) -> Option<&Arc<CancelToken>> {
        match self {
            Self::SingleRank => None,
            Self::Shared { cancel_token, .. } | Self::Collective { cancel_token, .. } => {
                Some(cancel_token)
            }
        }
    }
}

impl Core {
    /// Where the other ranks find this one; `None` where nothing is shared.
    pub(crate) fn segment_handle(&self) -> Option<SegmentHandle> {
        match &self.gradients.transport {
            GradientTransport::Shared { reducer, .. } => Some(reducer.segment_handle()),
            _ => None,
        }
    }

    /// Takes up the connection to all ranks, and puts shared memory under the windows of weights that are shared.
    pub(crate) fn join(&mut self, handles: &[SegmentHandle]) -> Result<()> {
        let GradientTransport::Shared {
            reducer, weights, ..
        } = &mut self.gradients.transport
        else {
            return misuse("join", "nothing is shared with other ranks");
        };
        reducer.join(handles)?;
        let (segment, start) = reducer.weights();
        for (unit, offset) in self.units.iter_mut().zip(weights) {
            if let (UnitWeights::Host { window, .. }, Some(offset)) = (&mut unit.weights, offset) {
                window.make_shared_home(&self.budget, Bucket::Weights, segment, start + *offset)?;
            }
        }
        Ok(())
    }

    /// Whether the unit's weights at home in host memory are one copy for all ranks.
    pub(crate) fn shares_weights(&self) -> bool {
        matches!(self.gradients.transport, GradientTransport::Shared { .. })
            && self.mesh.shares_weights()
    }

    /// Gives the unit room for gradients on their way out, if it has none.
    pub(crate) fn make_room(&mut self, unit: usize) -> Result<()> {
        if self.units[unit].outgoing.is_some() {
            return Ok(());
        }
        let bytes =
            to_usize(self.units[unit].layout.trainable_len()) * self.gradients.comm_dtype.size();
        let room = match &mut self.gradients.transport {
            GradientTransport::SingleRank => return misuse("accumulate", "there is no other rank"),
            GradientTransport::Shared { reducer, .. } => {
                if reducer.is_sent(unit) {
                    return misuse(
                        "accumulate",
                        format!(
                            "a gradient of unit {} arrived after the unit had been reduced: its module is used again \
                             after its backward was complete",
                            self.units[unit].name
                        ),
                    );
                }
                reducer.room(unit)?
            }
            GradientTransport::Collective { arena, .. } => {
                let ready = arena
                    .as_ref()
                    .and_then(|arena| arena.lease(bytes, PAGE).ok());
                match ready {
                    Some(lease) => lease,
                    // More units than usual wait for their turn: memory of its own, for as long as that takes.
                    None => {
                        Arena::new(&self.budget, Bucket::Gradients, bytes)?.lease(bytes, PAGE)?
                    }
                }
            }
        };
        self.units[unit].outgoing = Some(room);
        Ok(())
    }

    /// Where the other ranks' gradients of the unit are to arrive, rank after rank: address and bytes, valid until
    /// [`receive_from`](Self::receive_from).
    pub(crate) fn incoming(&mut self, unit: usize) -> Result<(usize, usize)> {
        self.check_unit("incoming", unit)?;
        if self.units[unit].incoming.is_none() {
            let kept = self.units[unit].state_tiles.len();
            let groups = self.units[unit].mesh.groups;
            let bytes = to_usize(groups.incoming_bytes(kept, self.gradients.comm_dtype));
            let GradientTransport::Collective {
                incoming: Some(arena),
                ..
            } = &self.gradients.transport
            else {
                return misuse("incoming", "nothing comes in by way of the caller");
            };
            self.units[unit].incoming = Some(arena.lease(bytes, PAGE)?);
        }
        let lease = self.units[unit].incoming.as_ref().expect("leased above");
        Ok((lease.as_ptr().expose_provenance(), lease.len()))
    }

    /// What other ranks have yet to do before a gradient of the unit can arrive: read what this one sent in the last
    /// backward. Calls that cannot be made at all are left to the call itself to refuse.
    pub(crate) fn before_accumulating(&self, unit: usize, param: usize) -> Option<PeerWait> {
        let this = self.units.get(unit)?;
        if this.outgoing.is_some() || !this.params.get(param)?.trainable {
            return None;
        }
        self.before_sending(unit)
    }

    /// The same, before the unit is sent.
    pub(crate) fn before_sending(&self, unit: usize) -> Option<PeerWait> {
        match &self.gradients.transport {
            GradientTransport::Shared { reducer, .. } if unit < self.units.len() => {
                reducer.before_filling(unit)
            }
            _ => None,
        }
    }

    /// What other ranks have yet to do before this one may read the unit's weights: update their parts of those that are
    /// one copy for all, for the last step that this rank made.
    pub(crate) fn before_gathering(&mut self, unit: usize) -> Result<Option<PeerWait>> {
        let awaited =
            |core: &Self| match (&core.gradients.transport, &core.units.get(unit)?.weights) {
                (GradientTransport::Shared { reducer, .. }, UnitWeights::Host { .. })
                    if core.shares_weights() =>
                {
                    reducer.before_reading(unit, core.step.count)
                }
                _ => None,
            };
        if awaited(self).is_none() {
            return Ok(None);
        }
        // Another rank may wait for this one.
        self.finish_step()?;
        Ok(awaited(self))
    }

    /// As [`before_gathering`](Self::before_gathering), for a unit that is gathered only where it has room.
    pub(crate) fn before_gathering_ahead(&mut self, unit: usize) -> Result<Option<PeerWait>> {
        if self.has_room(unit)? {
            self.before_gathering(unit)
        } else {
            Ok(None)
        }
    }

    /// What other ranks have yet to do before the unit can be summed, where the caller waits for it: send it. `round` is
    /// the round of the first look: a unit that another thread has summed meanwhile is refused, since its next round may
    /// never come.
    pub(crate) fn before_receiving(
        &mut self,
        unit: usize,
        wait: bool,
        round: &mut Option<u64>,
    ) -> Result<Option<PeerWait>> {
        let awaited = |core: &Self| match &core.gradients.transport {
            GradientTransport::Shared { reducer, .. } if wait && unit < core.units.len() => {
                Some((reducer.round(unit), reducer.before_taking(unit)))
            }
            _ => None,
        };
        let Some((present, unsent)) = awaited(self) else {
            return Ok(None);
        };
        if *round.get_or_insert(present) != present {
            return misuse(
                "receive",
                format!(
                    "another call has summed unit {} while this one waited for it",
                    self.units[unit].name
                ),
            );
        }
        if unsent.is_none() {
            return Ok(None);
        }
        // Another rank may wait for weights that this one has yet to update.
        self.finish_step()?;
        Ok(awaited(self).and_then(|(_, unsent)| unsent))
    }

    /// This rank's part of the unit's weights is that of the present step; the other ranks have to get it.
    pub(crate) fn weights_renewed(&mut self, unit: usize) {
        if self.units[unit].mesh.has_all() {
            return;
        }
        if self.shares_weights() && matches!(self.units[unit].weights, UnitWeights::Host { .. }) {
            self.weights_kept(unit);
            return;
        }
        match &mut self.units[unit].weights {
            UnitWeights::Host {
                all_shards_valid, ..
            }
            | UnitWeights::Moving {
                residence:
                    Residence::Here {
                        all_shards_valid, ..
                    },
                ..
            } => *all_shards_valid = false,
            _ => {}
        }
    }

    /// The step leaves this rank's part of the unit as it is.
    pub(crate) fn weights_kept(&mut self, unit: usize) {
        if let GradientTransport::Shared { reducer, .. } = &self.gradients.transport {
            reducer.set_version(unit, self.step.count);
        }
    }
}
