//! The connection to the other ranks: who they are, what is shared, and whose weights are how new.

use std::sync::Arc;

use zeroxide_exchange::{Post, PostPlan, Seat, Stop};
use zeroxide_layout::{Dtype, PAGE};
use zeroxide_memory::{Arena, Bucket, Budget, FRAME};

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::settings::{Place, Settings, UnitSpec, WeightHome, Wire};
use crate::unit::Unit;
use crate::weights::residence::{Residence, Weights};

/// Units whose gradients can be on their way at once, beside those that have room of their own.
const SLOTS: usize = 3;

/// How gradients leave this rank.
pub(crate) enum Mail {
    /// There is no other rank.
    Alone,
    /// Through shared memory.
    Shared {
        post: Box<Post>,
        /// Where each unit's weights start in the shared segment; `None` where they are not shared.
        weights: Vec<Option<usize>>,
        stop: Arc<Stop>,
    },
    /// Carried by the caller.
    Collective {
        /// Room for what is on its way out.
        arena: Option<Arena>,
        /// Room for what comes in, of one unit at a time.
        incoming: Option<Arena>,
        stop: Arc<Stop>,
    },
}

impl Mail {
    pub(crate) fn new(
        budget: &Budget,
        settings: &Settings,
        specs: &[UnitSpec],
        units: &[Unit],
    ) -> Result<Self> {
        let place = settings.place;
        if place.world == 1 {
            return Ok(Self::Alone);
        }
        let stop = Arc::new(Stop::default());
        let bytes: Vec<usize> = units
            .iter()
            .map(|unit| to_usize(unit.layout.trainable_len()) * settings.wire_grad.size())
            .collect();
        let long: Vec<usize> = (0..units.len())
            .filter(|unit| specs[*unit].long && bytes[*unit] > 0)
            .collect();
        let short = (0..units.len()).filter(|unit| !specs[*unit].long);
        let slots = SLOTS.min(short.clone().filter(|unit| bytes[*unit] > 0).count());
        if place.wire == Wire::Collective {
            let page = |unit: &usize| bytes[*unit].next_multiple_of(PAGE);
            let reserved: usize = long.iter().map(page).sum();
            let largest = short.map(|unit| page(&unit)).max().unwrap_or(0);
            let room = reserved + slots * largest;
            let coming = units
                .iter()
                .map(|unit| incoming_bytes(settings.place, settings.wire_grad, unit))
                .max()
                .unwrap_or(0);
            let reserve = |room: usize| match room {
                0 => Ok(None),
                room => Arena::new(budget, Bucket::Gradients, room).map(Some),
            };
            return Ok(Self::Collective {
                arena: reserve(room)?,
                incoming: reserve(coming.next_multiple_of(PAGE))?,
                stop,
            });
        }
        let mut end = 0;
        let weights = units
            .iter()
            .zip(specs)
            .map(|(unit, spec)| {
                let shared = place.shares_weights() && spec.weights == WeightHome::Host;
                shared.then(|| {
                    let start = end;
                    let size = to_usize(unit.layout.len()) * settings.compute.size();
                    // Huge pages need aligned starts; what lies between is never touched.
                    end = (start + size).next_multiple_of(FRAME);
                    start
                })
            })
            .collect();
        let plan = PostPlan {
            units: bytes,
            slots,
            long,
            weights: end,
        };
        let post = Post::new(
            place.rank as usize,
            place.world as usize,
            plan,
            budget,
            Arc::clone(&stop),
        )?;
        Ok(Self::Shared {
            post: Box::new(post),
            weights,
            stop,
        })
    }

    pub(crate) fn stop(&self) -> Option<&Arc<Stop>> {
        match self {
            Self::Alone => None,
            Self::Shared { stop, .. } | Self::Collective { stop, .. } => Some(stop),
        }
    }
}

impl Core {
    /// Where the other ranks find this one; `None` where nothing is shared.
    pub(crate) fn seat(&self) -> Option<Seat> {
        match &self.mail {
            Mail::Shared { post, .. } => Some(post.seat()),
            _ => None,
        }
    }

    /// Takes up the connection to all ranks, and puts shared memory under the windows of weights that are shared.
    pub(crate) fn join(&mut self, seats: &[Seat]) -> Result<()> {
        let Mail::Shared { post, weights, .. } = &mut self.mail else {
            return misuse("join", "nothing is shared with other ranks");
        };
        post.join(seats)?;
        let (segment, start) = post.weights();
        for (unit, offset) in self.units.iter_mut().zip(weights) {
            if let (Weights::Host { window, .. }, Some(offset)) = (&mut unit.weights, offset) {
                window.make_shared_home(&self.budget, Bucket::Weights, segment, start + *offset)?;
            }
        }
        Ok(())
    }

    /// Whether the unit's weights at home in host memory are one copy for all ranks.
    pub(crate) fn shares_weights(&self) -> bool {
        matches!(self.mail, Mail::Shared { .. }) && self.place.shares_weights()
    }

    /// Gives the unit room for gradients on their way out, if it has none.
    pub(crate) fn make_room(&mut self, unit: usize) -> Result<()> {
        if self.units[unit].outgoing.is_some() {
            return Ok(());
        }
        let bytes = to_usize(self.units[unit].layout.trainable_len()) * self.wire_grad.size();
        let room = match &mut self.mail {
            Mail::Alone => return misuse("land", "there is no other rank"),
            Mail::Shared { post, .. } => {
                if post.is_sent(unit) {
                    return misuse(
                        "land",
                        format!(
                            "a gradient of unit {} arrived after the unit had been reduced: its module is used again \
                             after its backward was complete",
                            self.units[unit].name
                        ),
                    );
                }
                post.room(unit)?
            }
            Mail::Collective { arena, .. } => {
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
            let bytes = incoming_bytes(self.place, self.wire_grad, &self.units[unit]);
            let Mail::Collective {
                incoming: Some(arena),
                ..
            } = &self.mail
            else {
                return misuse("incoming", "nothing comes in by way of the caller");
            };
            self.units[unit].incoming = Some(arena.lease(bytes, PAGE)?);
        }
        let lease = self.units[unit].incoming.as_ref().expect("leased above");
        Ok((lease.as_ptr().expose_provenance(), lease.len()))
    }

    /// Before this rank reads weights that others update: waits until they have, for the last step that this rank made.
    pub(crate) fn await_versions(&mut self, unit: usize) -> Result<()> {
        if !self.shares_weights() || !matches!(self.units[unit].weights, Weights::Host { .. }) {
            return Ok(());
        }
        let version = self.steps;
        let Mail::Shared { post, .. } = &self.mail else {
            return Ok(());
        };
        if post.has_version(unit, version) {
            return Ok(());
        }
        // Another rank may wait for this one.
        self.finish_step()?;
        let Mail::Shared { post, .. } = &self.mail else {
            return Ok(());
        };
        post.wait(|post| post.has_version(unit, version))?;
        Ok(())
    }

    /// This rank's part of the unit's weights is that of the present step; the other ranks have to get it.
    pub(crate) fn weights_renewed(&mut self, unit: usize) {
        if self.place.world == 1 || self.place.replicated {
            return;
        }
        if self.shares_weights() && matches!(self.units[unit].weights, Weights::Host { .. }) {
            self.weights_kept(unit);
            return;
        }
        match &mut self.units[unit].weights {
            Weights::Host { whole, .. }
            | Weights::Moving {
                residence: Residence::Here { whole, .. },
                ..
            } => *whole = false,
            _ => {}
        }
    }

    /// The step leaves this rank's part of the unit as it is.
    pub(crate) fn weights_kept(&mut self, unit: usize) {
        if let Mail::Shared { post, .. } = &self.mail {
            post.set_version(unit, self.steps);
        }
    }
}

/// Bytes of the other ranks' gradients of what a rank keeps of `unit`.
fn incoming_bytes(place: Place, wire: Dtype, unit: &Unit) -> usize {
    let kept = to_usize(unit.kept().end - unit.kept().start);
    kept * wire.size() * (place.world as usize - 1)
}
