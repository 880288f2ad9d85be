//! The flat layout of one unit: a set of parameters that is gathered and released together.

use std::ops::Range;

use crate::align::checked_align_up;
use crate::{Dtype, LayoutError};

/// Every parameter starts at a multiple of this many elements: one cache line of 2-byte elements is 32,
/// and 64 keeps fp32 and bf16 views of any parameter on 128-byte boundaries.
pub const PARAM_ALIGN: u64 = 64;

/// Each rank's slice is a multiple of this many elements, so that a block of 2-byte elements is a whole
/// number of 4 KiB pages on every rank.
pub const SHARD_ALIGN: u64 = 2048;

/// What the layout needs to know of a parameter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParamShape {
    /// Elements.
    pub numel: u64,
    /// Whether the optimizer updates it.
    pub trainable: bool,
}

/// Where one element of a parameter lies among the ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    /// The rank whose shard holds the element.
    pub rank: u32,
    /// Element offset in that rank's shard.
    pub offset_in_shard: u64,
}

/// The part of one parameter that lies in a range of the flat layout.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParamPiece {
    /// Index of the parameter, in the order given to [`UnitLayout::new`].
    pub param: usize,
    /// Element of the parameter at which the piece starts.
    pub offset_in_param: u64,
    /// Where the piece lies in the flat layout, in elements. Never empty.
    pub range: Range<u64>,
}

/// Flat layout of one unit over the ranks of a world.
///
/// Trainable parameters come first, frozen ones after them, each group in the order given. Every
/// parameter starts at a multiple of [`PARAM_ALIGN`]. The trainable part and the whole are both padded
/// to a multiple of [`SHARD_ALIGN`] x world, so either can be cut into one equal slice per rank.
/// Padding belongs to no parameter, and parameters without elements alone still get some: a part that has
/// a parameter is never empty. Frozen parameters may be of another dtype than the elements; they are then
/// counted in as many elements as their bytes need.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnitLayout {
    params: Vec<Placed>,
    /// Parameter indices by ascending offset; parameters without elements are left out.
    order: Vec<usize>,
    trainable_len: u64,
    len: u64,
    world: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Placed {
    shape: ParamShape,
    offset: u64,
}

impl UnitLayout {
    /// Lays `params` out for `world` ranks.
    ///
    /// # Errors
    /// [`LayoutError::EmptyWorld`] when `world` is 0, [`LayoutError::TooLarge`] when the fp32 bytes of
    /// the unit do not fit a file offset.
    pub fn new(params: &[ParamShape], world: u32) -> Result<Self, LayoutError> {
        if world == 0 {
            return Err(LayoutError::EmptyWorld);
        }
        let shard_align = SHARD_ALIGN * u64::from(world);
        let mut placed: Vec<Placed> = params
            .iter()
            .map(|&shape| Placed { shape, offset: 0 })
            .collect();
        let mut order = Vec::with_capacity(params.len());
        let mut place = |trainable: bool, start: u64| -> Result<u64, LayoutError> {
            let mut end = start;
            let mut any = false;
            for (index, param) in placed.iter_mut().enumerate() {
                if param.shape.trainable != trainable {
                    continue;
                }
                any = true;
                param.offset = aligned(end, PARAM_ALIGN)?;
                end = param
                    .offset
                    .checked_add(param.shape.numel)
                    .ok_or(TOO_LARGE)?;
                if param.shape.numel > 0 {
                    order.push(index);
                }
            }
            aligned(end.max(start + u64::from(any)), shard_align)
        };
        let trainable_len = place(true, 0)?;
        let len = place(false, trainable_len)?;
        let bytes = len.checked_mul(Dtype::F32.size() as u64).ok_or(TOO_LARGE)?;
        i64::try_from(bytes).map_err(|_| TOO_LARGE)?;
        Ok(Self {
            params: placed,
            order,
            trainable_len,
            len,
            world,
        })
    }

    /// Parameters in the unit.
    pub fn params(&self) -> usize {
        self.params.len()
    }

    /// Ranks the unit is cut for.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// Element offset of parameter `param` in the flat layout.
    ///
    /// # Panics
    /// When the unit has no such parameter.
    pub fn offset(&self, param: usize) -> u64 {
        self.params[param].offset
    }

    /// Elements of parameter `param`.
    ///
    /// # Panics
    /// When the unit has no such parameter.
    pub fn numel(&self, param: usize) -> u64 {
        self.params[param].shape.numel
    }

    /// Whether the optimizer updates parameter `param`.
    ///
    /// # Panics
    /// When the unit has no such parameter.
    pub fn is_trainable(&self, param: usize) -> bool {
        self.params[param].shape.trainable
    }

    /// Elements of the trainable part, its padding included: it is `0..trainable_len`.
    pub fn trainable_len(&self) -> u64 {
        self.trainable_len
    }

    /// Elements of the whole layout, padding included.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the layout holds no element at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces of parameters inside `range` (elements of the flat layout), by ascending offset.
    /// Padding yields nothing.
    pub fn params_in(&self, range: Range<u64>) -> impl Iterator<Item = ParamPiece> + '_ {
        let first = self
            .order
            .partition_point(|&index| self.end(index) <= range.start);
        self.order[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |&&index| self.params[index].offset < end
            })
            .filter_map(move |&index| {
                let offset = self.params[index].offset;
                let start = offset.max(range.start);
                let end = self.end(index).min(range.end);
                (start < end).then(|| ParamPiece {
                    param: index,
                    offset_in_param: start - offset,
                    range: start..end,
                })
            })
    }

    /// The slice of the whole layout that `rank` owns, in elements. All ranks' slices are equally long.
    ///
    /// # Panics
    /// When `rank` is not below the world size.
    pub fn shard(&self, rank: u32) -> Range<u64> {
        self.slice(self.len, rank)
    }

    /// The slice of the trainable part (`0..trainable_len`) whose optimizer state `rank` owns, in
    /// elements. Equal to [`shard`](Self::shard) where no parameter is frozen.
    ///
    /// # Panics
    /// When `rank` is not below the world size.
    pub fn trainable_shard(&self, rank: u32) -> Range<u64> {
        self.slice(self.trainable_len, rank)
    }

    /// Where element `element` of parameter `param` lies among the [`shard`](Self::shard)s.
    ///
    /// # Errors
    /// [`LayoutError::NoSuchElement`].
    pub fn locate(&self, param: usize, element: u64) -> Result<Location, LayoutError> {
        let flat = self.flat(param, element)?;
        Ok(locate_in(flat, self.len / u64::from(self.world)))
    }

    /// Where element `element` of parameter `param` lies among the
    /// [`trainable_shard`](Self::trainable_shard)s.
    ///
    /// # Errors
    /// [`LayoutError::NoSuchElement`], or [`LayoutError::Frozen`] for a parameter without optimizer
    /// state.
    pub fn locate_trainable(&self, param: usize, element: u64) -> Result<Location, LayoutError> {
        let flat = self.flat(param, element)?;
        if !self.is_trainable(param) {
            return Err(LayoutError::Frozen { param });
        }
        Ok(locate_in(flat, self.trainable_len / u64::from(self.world)))
    }

    fn end(&self, param: usize) -> u64 {
        self.params[param].offset + self.params[param].shape.numel
    }

    fn slice(&self, len: u64, rank: u32) -> Range<u64> {
        assert!(
            rank < self.world,
            "rank {rank} is outside a world of {}",
            self.world
        );
        let each = len / u64::from(self.world);
        let start = u64::from(rank) * each;
        start..start + each
    }

    fn flat(&self, param: usize, element: u64) -> Result<u64, LayoutError> {
        let numel = self
            .params
            .get(param)
            .map_or(0, |placed| placed.shape.numel);
        if element >= numel {
            let params = self.params.len();
            return Err(LayoutError::NoSuchElement {
                param,
                element,
                params,
                numel,
            });
        }
        Ok(self.params[param].offset + element)
    }
}

const TOO_LARGE: LayoutError = LayoutError::TooLarge {
    what: "unit layout",
};

fn aligned(n: u64, align: u64) -> Result<u64, LayoutError> {
    checked_align_up(n, align).ok_or(TOO_LARGE)
}

fn locate_in(flat: u64, each: u64) -> Location {
    let rank =
        u32::try_from(flat / each).expect("an element of the layout lies in one of its ranks");
    Location {
        rank,
        offset_in_shard: flat % each,
    }
}
