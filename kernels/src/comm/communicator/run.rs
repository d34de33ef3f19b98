//! A call under way: its checks, what it moves, and the sums that all back ends share.

use super::Communicator;
use crate::comm::backend::{Backend, Call, Failure, Transfer, is_supported, offsets, peers};
use crate::comm::reduce::{ReduceOp, reduce_in_rank_order};
use tch::{Device, Kind, Tensor};

/// Most elements of a part that one round of a reduction moves: 4 MiB in fp32.
const PIECE_ELEMENTS: usize = 1 << 20;

/// Cuts a flat tensor into runs.
pub(super) fn parts(flat: &Tensor, counts: &[usize]) -> Vec<Tensor> {
    offsets(counts).iter().zip(counts).map(|(&at, &count)| flat.narrow(0, at as i64, count as i64)).collect()
}

/// A call under way: the communicator and its description.
pub(super) struct Run<'a> {
    pub(super) comm: &'a Communicator,
    pub(super) call: Call,
}

impl Run<'_> {
    pub(super) fn rank(&self) -> usize {
        self.call.rank
    }

    pub(super) fn size(&self) -> usize {
        self.call.size
    }

    // ---- checks -----------------------------------------------------------------------------------------------

    pub(super) fn flat(&self, what: &str, tensor: &Tensor) -> Result<Tensor, Failure> {
        let device = self.comm.options.device;
        if !tensor.is_contiguous() {
            return Err(Failure::invalid(format!("{what} of shape {:?} is not contiguous", tensor.size())));
        }
        if tensor.device() != device {
            return Err(Failure::invalid(format!(
                "{what} is on {:?}, the communicator on {device:?}",
                tensor.device()
            )));
        }
        if !is_supported(tensor.kind()) {
            return Err(Failure::invalid(format!("{what} is of type {:?}, which is not sent", tensor.kind())));
        }
        Ok(tensor.f_view([-1])?)
    }

    pub(super) fn expect_kind(&self, what: &str, tensor: &Tensor, kinds: &[Kind]) -> Result<(), Failure> {
        if kinds.contains(&tensor.kind()) {
            return Ok(());
        }
        Err(Failure::invalid(format!("{what} is of type {:?}, expected one of {kinds:?}", tensor.kind())))
    }

    pub(super) fn expect_counts(&self, what: &str, tensor: &Tensor, counts: &[usize]) -> Result<(), Failure> {
        if counts.len() != self.size() {
            return Err(Failure::invalid(format!("{} counts for {what}, but {} ranks", counts.len(), self.size())));
        }
        let total: usize = counts.iter().sum();
        if total != tensor.numel() {
            return Err(Failure::invalid(format!(
                "{what} has {} elements, its counts add up to {total}",
                tensor.numel()
            )));
        }
        Ok(())
    }

    pub(super) fn expect_numel(&self, what: &str, tensor: &Tensor, count: usize) -> Result<(), Failure> {
        if tensor.numel() == count {
            return Ok(());
        }
        Err(Failure::invalid(format!("{what} has {} elements, its count is {count}", tensor.numel())))
    }

    pub(super) fn expect_rank(&self, rank: usize) -> Result<(), Failure> {
        if rank < self.size() {
            return Ok(());
        }
        Err(Failure::invalid(format!("rank {rank} of a group of {}", self.size())))
    }

    // ---- moving ----------------------------------------------------------------------------------------------

    pub(super) fn copy(&self, output: &Tensor, input: &Tensor) -> Result<(), Failure> {
        if output.numel() > 0 && output.data_ptr() != input.data_ptr() {
            output.shallow_clone().f_copy_(input)?;
        }
        Ok(())
    }

    pub(super) fn count_bytes(&self, bytes: usize) {
        self.comm.shared.count_bytes(bytes);
    }

    pub(super) fn with_backend(
        &self,
        body: impl FnOnce(&mut dyn Backend, &Call) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match &self.comm.backend {
            Some(backend) => body(backend.borrow_mut().as_mut(), &self.call),
            None => Ok(()),
        }
    }

    pub(super) fn exchange(&self, sends: Vec<Transfer>, receives: Vec<Transfer>) -> Result<(), Failure> {
        let full = |transfers: Vec<Transfer>| -> Vec<Transfer> {
            transfers.into_iter().filter(|transfer| transfer.num_bytes() > 0).collect()
        };
        let (sends, receives) = (full(sends), full(receives));
        self.count_bytes(sends.iter().map(Transfer::num_bytes).sum());
        self.with_backend(|backend, call| backend.exchange(call, &sends, &receives))
    }

    pub(super) fn all_to_all(&self, outputs: &[Tensor], inputs: &[Tensor]) -> Result<(), Failure> {
        let transfers = |tensors: &[Tensor]| -> Vec<Transfer> {
            peers(&self.call).map(|peer| Transfer { peer, data: tensors[peer].shallow_clone() }).collect()
        };
        self.exchange(transfers(inputs), transfers(outputs))
    }

    pub(super) fn all_gather(&self, output: &Tensor, input: &Tensor, counts: &[usize]) -> Result<(), Failure> {
        let at: usize = counts[..self.rank()].iter().sum();
        self.copy(&output.narrow(0, at as i64, counts[self.rank()] as i64), input)?;
        if output.numel() == 0 {
            return Ok(());
        }
        self.count_bytes((self.size() - 1) * input.numel() * input.kind().elt_size_in_bytes());
        self.with_backend(|backend, call| backend.all_gather(call, output, input, counts))
    }

    /// In rounds of at most [`PIECE_ELEMENTS`] per rank, so that what is received stays small and in the cache.
    pub(super) fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<(), Failure> {
        let (rank, offsets) = (self.rank(), offsets(counts));
        let room = counts[rank].min(PIECE_ELEMENTS) as i64;
        let scratch = Tensor::f_empty([self.size() as i64, room], (input.kind(), input.device()))?;
        let num_rounds = counts.iter().map(|count| count.div_ceil(PIECE_ELEMENTS)).max().unwrap_or(0);
        for round in 0..num_rounds {
            let piece = |count: usize| {
                let at = (round * PIECE_ELEMENTS).min(count);
                (at, PIECE_ELEMENTS.min(count - at) as i64)
            };
            let inputs: Vec<Tensor> = (counts.iter().zip(&offsets))
                .map(|(&count, offset)| (piece(count), offset))
                .map(|((at, length), offset)| input.narrow(0, (offset + at) as i64, length))
                .collect();
            let (at, length) = piece(counts[rank]);
            let received: Vec<Tensor> = (0..self.size())
                .map(|from| if from == rank { inputs[rank].shallow_clone() } else { scratch.get(from as i64) })
                .map(|part| part.narrow(0, 0, length))
                .collect();
            self.all_to_all(&received, &inputs)?;
            reduce_in_rank_order(&received, Some(rank), &output.narrow(0, at as i64, length), op)?;
        }
        Ok(())
    }

    pub(super) fn all_reduce_small(&self, flat: &Tensor, op: ReduceOp) -> Result<(), Failure> {
        let counts = vec![flat.numel(); self.size()];
        let all = Tensor::f_empty([(flat.numel() * self.size()) as i64], (flat.kind(), flat.device()))?;
        self.all_gather(&all, flat, &counts)?;
        Ok(reduce_in_rank_order(&parts(&all, &counts), None, flat, op)?)
    }

    pub(super) fn all_reduce_in_parts(&self, flat: &Tensor, op: ReduceOp) -> Result<(), Failure> {
        let range = |rank| tangelo_core::layout::part_range(flat.numel(), 1, self.size(), rank);
        let counts: Vec<usize> = (0..self.size()).map(|rank| range(rank).len()).collect();
        let own = &parts(flat, &counts)[self.rank()];
        self.reduce_scatter(own, flat, &counts, op)?;
        self.all_gather(flat, own, &counts)
    }

    pub(super) fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
        let device = self.comm.options.device;
        let length = Tensor::f_from_slice(&[bytes.len() as i64])?.f_to_device(device)?;
        let lengths = Tensor::f_zeros([self.size() as i64], (Kind::Int64, device))?;
        self.all_gather(&lengths, &length, &vec![1; self.size()])?;
        let counts: Vec<i64> = Vec::try_from(lengths.f_to_device(Device::Cpu)?)?;
        let counts: Vec<usize> = counts.into_iter().map(|count| count as usize).collect();
        let input = Tensor::f_from_slice(bytes)?.f_to_device(device)?;
        let output = Tensor::f_zeros([counts.iter().sum::<usize>() as i64], (Kind::Uint8, device))?;
        self.all_gather(&output, &input, &counts)?;
        parts(&output.f_to_device(Device::Cpu)?, &counts).into_iter().map(|part| Ok(Vec::try_from(part)?)).collect()
    }
}
