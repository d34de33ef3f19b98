//! Buffers cut over the ranks of a group, and the layouts in which their parts travel.
//!
//! A unit's weights and gradients lie in flat buffers. Where a ZeRO scope cuts them, a rank keeps its parts of them end to
//! end in a *shard*. A [`Cut`] says which pieces of the larger buffer each rank of a group has: laid out by owner, they
//! travel in one collective with uneven counts.

use std::ops::Range;
use tangelo_configs::Sharding;
use tangelo_configs::sharding::chunk_rows;
use tangelo_core::{Group, Level};
use tangelo_models::{Model, UnitWeights};
use tch::{Device, Kind, Tensor};

/// A part of a parameter that one rank has, and where it lies in the unit's flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRange {
    /// Index of the parameter within its unit.
    pub param: usize,
    /// The elements in the unit's flat buffer.
    pub flat: Range<usize>,
    /// Elements per chunk.
    pub chunk_len: usize,
}

impl OwnedRange {
    /// Number of chunks in the range; the last may be short.
    pub fn num_chunks(&self) -> usize {
        self.flat.len().div_ceil(self.chunk_len)
    }
}

/// What `rank` has of a unit at `level`, in the order of the flat buffer; parameters of which it has nothing are left out.
/// `rank` must compute with the same part of the model as the rank that asks.
pub fn owned(sharding: &Sharding, unit: &UnitWeights, level: Level, rank: usize) -> Vec<OwnedRange> {
    let range = |(param, span): (usize, &tangelo_models::weights::ParamSpan)| {
        let flat = span.flat_range(&sharding.box_at(&span.meta, level, rank));
        let row_len = span.row_len();
        (!flat.is_empty()).then(|| OwnedRange { param, flat, chunk_len: chunk_rows(row_len) * row_len })
    };
    unit.spans().iter().enumerate().filter_map(range).collect()
}

/// Where flat ranges lie in a buffer.
#[derive(Clone, Debug)]
pub enum Place {
    /// The buffer is the whole flat one.
    Flat,
    /// The buffer holds these ranges, end to end.
    Shard(Vec<Range<usize>>),
}

impl Place {
    /// Where level `level` of a unit lies: flat where its scope is one rank.
    pub fn of(sharding: &Sharding, unit: &UnitWeights, level: Level, rank: usize) -> Place {
        match sharding.topology().scopes.degree(level) {
            1 => Place::Flat,
            _ => Place::Shard(owned(sharding, unit, level, rank).into_iter().map(|r| r.flat).collect()),
        }
    }

    /// Elements of a shard; `None` where there is none.
    pub fn shard_len(&self) -> Option<usize> {
        match self {
            Place::Flat => None,
            Place::Shard(ranges) => Some(ranges.iter().map(Range::len).sum()),
        }
    }

    /// Where a flat range lies in the buffer. It must be inside one of the buffer's.
    pub fn locate(&self, flat: &Range<usize>) -> Range<usize> {
        let Place::Shard(ranges) = self else { return flat.clone() };
        let mut before = 0;
        for range in ranges {
            if range.start <= flat.start && flat.end <= range.end {
                let at = before + flat.start - range.start;
                return at..at + flat.len();
            }
            before += range.len();
        }
        panic!("{flat:?} is not in {ranges:?}: levels are not nested")
    }
}

/// A piece of a unit's buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    unit: usize,
    range: Range<usize>,
}

/// Buffers of some units, cut over the ranks of a group.
#[derive(Clone, Debug)]
pub struct Cut {
    /// By owner, in group order.
    pieces: Vec<Vec<Piece>>,
    /// Elements per owner.
    counts: Vec<usize>,
    /// This rank's place in the group.
    own: usize,
}

impl Cut {
    /// The buffers that lie as `places` say, of the units `units` of `model`, cut to `level` over `group`.
    pub fn new(
        model: &Model,
        sharding: &Sharding,
        units: Range<usize>,
        places: &[Place],
        level: Level,
        group: Group,
        rank: usize,
    ) -> Cut {
        let topology = sharding.topology();
        let pieces_of = |member: usize| {
            let mut pieces: Vec<Piece> = Vec::new();
            for unit in units.clone() {
                for owned in owned(sharding, &model.units()[unit], level, member) {
                    push(&mut pieces, Piece { unit, range: places[unit].locate(&owned.flat) });
                }
            }
            pieces
        };
        let pieces: Vec<Vec<Piece>> = topology.members(group, rank).into_iter().map(pieces_of).collect();
        let counts = pieces.iter().map(|p| p.iter().map(|piece| piece.range.len()).sum()).collect();
        Cut { pieces, counts, own: topology.index(group, rank) }
    }

    /// Elements per owner.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Elements of all owners.
    pub fn len(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Whether nobody owns anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements that this rank owns.
    pub fn own_len(&self) -> usize {
        self.counts[self.own]
    }

    /// All owners' pieces, one owner after the other.
    pub fn pack<'a>(&self, buffer: impl Fn(usize) -> &'a Tensor, kind: Kind, device: Device) -> Tensor {
        let packed = Tensor::empty([self.len() as i64], (kind, device));
        each(self.pieces.iter().flatten(), |piece, at| {
            narrow(&packed, &at).copy_(&narrow(buffer(piece.unit), &piece.range))
        });
        packed
    }

    /// The reverse of [`Cut::pack`].
    pub fn unpack<'a>(&self, packed: &Tensor, buffer: impl Fn(usize) -> &'a Tensor) {
        each(self.pieces.iter().flatten(), |piece, at| {
            narrow(buffer(piece.unit), &piece.range).copy_(&narrow(packed, &at))
        });
    }

    /// This rank's pieces.
    pub fn pack_own<'a>(&self, buffer: impl Fn(usize) -> &'a Tensor, kind: Kind, device: Device) -> Tensor {
        let packed = Tensor::empty([self.own_len() as i64], (kind, device));
        each(&self.pieces[self.own], |piece, at| narrow(&packed, &at).copy_(&narrow(buffer(piece.unit), &piece.range)));
        packed
    }

    /// The reverse of [`Cut::pack_own`].
    pub fn unpack_own<'a>(&self, packed: &Tensor, buffer: impl Fn(usize) -> &'a Tensor) {
        each(&self.pieces[self.own], |piece, at| narrow(buffer(piece.unit), &piece.range).copy_(&narrow(packed, &at)));
    }
}

/// Calls `f` with each piece and its place in a buffer that holds just those.
fn each<'a>(pieces: impl IntoIterator<Item = &'a Piece>, mut f: impl FnMut(&Piece, Range<usize>)) {
    let mut at = 0;
    for piece in pieces {
        f(piece, at..at + piece.range.len());
        at += piece.range.len();
    }
}

/// Part of a flat tensor.
pub fn narrow(flat: &Tensor, range: &Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}

/// Adds a piece, joined to the last one where they touch, so that one copy moves both.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.unit == piece.unit && last.range.end == piece.range.start => {
            last.range.end = piece.range.end
        }
        _ => pieces.push(piece),
    }
}
