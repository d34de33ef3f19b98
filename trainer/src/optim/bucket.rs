//! Gradients of neighbouring units that travel in one collective.
//!
//! A bucket's buffer is laid out by owner: all that the first rank of the scope owns, then the second's, and so on.
//! Reducing is then one reduce-scatter, gathering weights one all-gather, each with uneven counts.

use crate::error::Result;
use crate::shards::{ZeroScope, total_len};
use std::ops::Range;
use tangelo_kernels::comm::Communicator;
use tangelo_models::Model;
use tch::{Kind, Tensor};

/// A piece of a unit's flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    unit: usize,
    flat: Range<usize>,
}

/// Neighbouring units that are reduced and gathered together.
#[derive(Debug)]
pub struct Bucket {
    /// By owner, in the order of the scope.
    pieces: Vec<Vec<Piece>>,
    /// Elements per owner.
    counts: Vec<usize>,
}

impl Bucket {
    /// Cuts a model's units into buckets of about `elements`.
    pub fn cut(model: &Model, zero: &ZeroScope, group: &[usize], elements: usize) -> Vec<Bucket> {
        let mut buckets: Vec<Bucket> = Vec::new();
        let mut filled = usize::MAX;
        for (unit, weights) in model.units().iter().enumerate() {
            if filled >= elements {
                buckets.push(Bucket { pieces: vec![Vec::new(); group.len()], counts: vec![0; group.len()] });
                filled = 0;
            }
            let bucket = buckets.last_mut().expect("one was just pushed");
            for (owner, &rank) in group.iter().enumerate() {
                let ranges = zero.owned(weights.spans(), rank);
                bucket.counts[owner] += total_len(&ranges);
                bucket.pieces[owner].extend(ranges.into_iter().map(|r| Piece { unit, flat: r.flat }));
                filled += total_len(&zero.owned(weights.spans(), rank));
            }
        }
        for pieces in buckets.iter_mut().flat_map(|b| &mut b.pieces) {
            merge(pieces);
        }
        buckets
    }

    fn len(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Sums this bucket's gradients over `data`; afterwards the pieces this rank owns hold the sums.
    pub fn reduce(&self, model: &Model, data: &Communicator, scope: &Communicator) -> Result<()> {
        let owner = scope.rank();
        let buffer = Tensor::zeros([self.len() as i64], (Kind::Float, model.device()));
        self.each(0..self.pieces.len(), |piece, at| {
            narrow(&buffer, &at).copy_(&narrow(grad(model, piece), &piece.flat))
        });
        let owned = if scope.size() == data.size() && scope.size() > 1 {
            let owned = Tensor::zeros([self.counts[owner] as i64], (Kind::Float, model.device()));
            data.reduce_scatter(&owned, &buffer, &self.counts)?;
            owned
        } else {
            // Replicated states, or a scope smaller than the data ranks: every rank sums everything.
            data.all_reduce(&buffer)?;
            let before: usize = self.counts[..owner].iter().sum();
            narrow(&buffer, &(before..before + self.counts[owner]))
        };
        self.each(owner..owner + 1, |piece, at| narrow(grad(model, piece), &piece.flat).copy_(&narrow(&owned, &at)));
        Ok(())
    }

    /// Gives every rank of `scope` the weights that the others own.
    pub fn gather(&self, model: &Model, scope: &Communicator) -> Result<()> {
        let owner = scope.rank();
        let options = (model.kind(), model.device());
        let own = Tensor::zeros([self.counts[owner] as i64], options);
        let flat = |piece: &Piece| narrow(model.units()[piece.unit].flat(), &piece.flat);
        self.each(owner..owner + 1, |piece, at| narrow(&own, &at).copy_(&flat(piece)));
        let all = Tensor::zeros([self.len() as i64], options);
        scope.all_gather_into(&all, &own, &self.counts)?;
        self.each(0..self.pieces.len(), |piece, at| flat(piece).copy_(&narrow(&all, &at)));
        Ok(())
    }

    /// Calls `f` with each piece of `owners` and its place in a buffer that holds just those.
    fn each(&self, owners: Range<usize>, mut f: impl FnMut(&Piece, Range<usize>)) {
        let mut at = 0;
        for piece in self.pieces[owners].iter().flatten() {
            f(piece, at..at + piece.flat.len());
            at += piece.flat.len();
        }
    }
}

fn grad<'a>(model: &'a Model, piece: &Piece) -> &'a Tensor {
    model.units()[piece.unit].main_grad().expect("a trained model has gradients")
}

fn narrow(flat: &Tensor, range: &Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}

/// Joins pieces that touch, so that one copy moves them.
fn merge(pieces: &mut Vec<Piece>) {
    let mut merged: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces.drain(..) {
        match merged.last_mut() {
            Some(last) if last.unit == piece.unit && last.flat.end == piece.flat.start => {
                last.flat.end = piece.flat.end
            }
            _ => merged.push(piece),
        }
    }
    *pieces = merged;
}
