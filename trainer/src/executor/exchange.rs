//! What ranks give each other between the parts of a block: tokens for tensor parallelism, heads for tokens (Ulysses).

use crate::error::Result;
use crate::groups::Groups;
use crate::micro_batch::SequencePlace;
use std::ops::Range;
use tangelo_configs::MixerSpec;
use tangelo_core::{Exchange, Group, SequenceLayout};
use tangelo_kernels::comm::Communicator;
use tangelo_models::block::Block;
use tch::{Kind, Tensor};

/// Moves tensors between the ranks that share a sequence.
pub struct Exchanger<'a> {
    tensor: Option<&'a Communicator>,
    heads: Option<&'a Communicator>,
    place: SequencePlace,
}

impl<'a> Exchanger<'a> {
    /// The exchanges of the rank at `place`.
    pub fn new(groups: &'a Groups, place: SequencePlace) -> Exchanger<'a> {
        Exchanger { tensor: groups.get(Group::Tensor), heads: groups.get(Group::Heads), place }
    }

    /// Tokens in this rank's residual stream.
    pub fn own_tokens(&self, layout: SequenceLayout) -> usize {
        self.tensor_counts(layout)[self.place.tensor]
    }

    /// Which of the tokens of its tensor group these are.
    pub fn own_range(&self, layout: SequenceLayout) -> Range<usize> {
        let counts = self.tensor_counts(layout);
        let start = counts[..self.place.tensor].iter().sum();
        start..start + counts[self.place.tensor]
    }

    fn tensor_counts(&self, layout: SequenceLayout) -> Vec<usize> {
        layout.tensor_counts(self.place.ring, self.place.heads)
    }

    /// Does an exchange to what is being worked on (or its gradients) in a block.
    pub fn apply(&self, what: Exchange, work: &mut Vec<Tensor>, layout: SequenceLayout, block: &Block) -> Result<()> {
        let taken = std::mem::take(work);
        *work = match what {
            Exchange::GatherSequence => {
                taken.into_iter().map(|h| self.gather_sequence(h, layout)).collect::<Result<_>>()?
            }
            Exchange::ScatterSequence => {
                taken.into_iter().map(|h| self.scatter_sequence(h, layout)).collect::<Result<_>>()?
            }
            Exchange::TokensToHeads => self.tokens_to_heads(&taken, layout)?,
            Exchange::HeadsToTokens => self.heads_to_tokens(&taken, layout, block)?,
        };
        Ok(())
    }

    /// `[own tokens, D]` of each tensor rank to `[their tokens, D]`.
    pub fn gather_sequence(&self, h: Tensor, layout: SequenceLayout) -> Result<Tensor> {
        let Some(comm) = self.tensor else { return Ok(h) };
        let width = h.size()[1];
        let counts = self.tensor_counts(layout);
        let all = Tensor::empty([counts.iter().sum::<usize>() as i64, width], (h.kind(), h.device()));
        comm.all_gather_into(&all, &h.contiguous(), &times(&counts, width))?;
        Ok(all)
    }

    /// The sum over tensor ranks of `[their tokens, D]`, of it this rank's tokens.
    pub fn scatter_sequence(&self, h: Tensor, layout: SequenceLayout) -> Result<Tensor> {
        let Some(comm) = self.tensor else { return Ok(h) };
        let width = h.size()[1];
        let counts = self.tensor_counts(layout);
        let own = Tensor::empty([counts[self.place.tensor] as i64, width], (h.kind(), h.device()));
        comm.reduce_scatter(&own, &h.contiguous(), &times(&counts, width))?;
        Ok(own)
    }

    /// `[own tokens, n, head_dim]` each, of n heads, to `[tokens of all heads ranks, n / ranks, head_dim]`: all tensors in
    /// one exchange. Ranks beyond n get copies.
    fn tokens_to_heads(&self, parts: &[Tensor], layout: SequenceLayout) -> Result<Vec<Tensor>> {
        let Some(comm) = self.heads else { return Ok(parts.iter().map(Tensor::shallow_clone).collect()) };
        let ranks = comm.size() as i64;
        let head_dim = parts[0].size()[2];
        let widths: Vec<i64> = parts.iter().map(|p| share(p.size()[1], ranks)).collect();
        let width: i64 = widths.iter().sum();
        let for_rank = |rank: i64| -> Vec<Tensor> {
            let head = |(part, &n): (&Tensor, &i64)| part.narrow(1, rank * part.size()[1] / ranks, n);
            parts.iter().zip(&widths).map(head).collect()
        };
        let send: Vec<Tensor> = (0..ranks).map(|rank| Tensor::cat(&for_rank(rank), 1)).collect();
        let send = Tensor::cat(&send, 0);
        let tokens = layout.head_counts(self.place.ring);
        let total: usize = tokens.iter().sum();
        let out = Tensor::empty([total as i64, width, head_dim], (send.kind(), send.device()));
        let own = vec![tokens[self.place.heads]; comm.size()];
        comm.all_to_all_single(&out, &send, &times(&tokens, width * head_dim), &times(&own, width * head_dim))?;
        Ok(split(&out, &widths))
    }

    /// The reverse, for tensors whose heads are those of the queries or of `[q, k, v]`. What ranks have copies of is summed.
    fn heads_to_tokens(&self, parts: &[Tensor], layout: SequenceLayout, block: &Block) -> Result<Vec<Tensor>> {
        let Some(comm) = self.heads else { return Ok(parts.iter().map(Tensor::shallow_clone).collect()) };
        let MixerSpec::Attention(a) = &block.spec().mixer;
        let num_heads = [a.num_heads as i64, a.num_kv_heads as i64, a.num_kv_heads as i64];
        let widths: Vec<i64> = parts.iter().map(|p| p.size()[1]).collect();
        let (width, head_dim) = (widths.iter().sum::<i64>(), parts[0].size()[2]);
        let send = Tensor::cat(parts, 1);
        let tokens = layout.head_counts(self.place.ring);
        let own = tokens[self.place.heads];
        let out = Tensor::empty([comm.size() as i64, own as i64, width, head_dim], (send.kind(), send.device()));
        let back = vec![own; comm.size()];
        comm.all_to_all_single(&out, &send, &times(&back, width * head_dim), &times(&tokens, width * head_dim))?;
        let from: Vec<Vec<Tensor>> = (0..comm.size()).map(|rank| split(&out.get(rank as i64), &widths)).collect();
        let join = |part: usize| {
            let pieces: Vec<Tensor> = from.iter().map(|p| p[part].shallow_clone()).collect();
            let copies = comm.size() as i64 / num_heads[part];
            if copies > 1 { sum_copies(&pieces, copies as usize) } else { Tensor::cat(&pieces, 1) }
        };
        Ok((0..parts.len()).map(join).collect())
    }
}

/// Heads of each rank: at least one.
fn share(heads: i64, ranks: i64) -> i64 {
    (heads / ranks).max(1)
}

/// Neighbouring ranks' pieces of one head, added in rank order in fp32 where they are narrower.
fn sum_copies(pieces: &[Tensor], copies: usize) -> Tensor {
    let kind = pieces[0].kind();
    let wide = if kind == Kind::Double { kind } else { Kind::Float };
    let sum = |group: &[Tensor]| {
        let first = group[0].to_kind(wide);
        group[1..].iter().fold(first, |sum, piece| sum + piece.to_kind(wide)).to_kind(kind)
    };
    Tensor::cat(&pieces.chunks(copies).map(sum).collect::<Vec<_>>(), 1)
}

/// Cuts dim 1.
fn split(tensor: &Tensor, widths: &[i64]) -> Vec<Tensor> {
    let starts = widths.iter().scan(0, |at, &n| Some(std::mem::replace(at, *at + n)));
    starts.zip(widths).map(|(start, &n)| tensor.narrow(1, start, n).contiguous()).collect()
}

fn times(counts: &[usize], width: i64) -> Vec<usize> {
    counts.iter().map(|&n| n * width as usize).collect()
}
