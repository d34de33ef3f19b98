//! Blocks as rows of plain tensors, for devices without kernels of ours and for float64.

use tch::{Device, Kind, Tensor};

use super::{BLOCK_TOKENS, LayerShape, PagedBatch, PagedSequence};
use crate::op::attention::attention_with_past;

/// Keys and values of one layer.
#[derive(Debug)]
pub struct PlainBlocks {
    /// `[blocks * BLOCK_TOKENS, K, hd]`
    keys: Tensor,
    /// `[blocks * BLOCK_TOKENS, K, hd]`
    values: Tensor,
}

impl PlainBlocks {
    /// Zeros.
    pub fn new(shape: &LayerShape, num_blocks: usize, kind: Kind, device: Device) -> PlainBlocks {
        let size = [(num_blocks * BLOCK_TOKENS) as i64, shape.num_kv_heads as i64, shape.head_dim as i64];
        PlainBlocks { keys: Tensor::zeros(size, (kind, device)), values: Tensor::zeros(size, (kind, device)) }
    }

    /// See [`super::PagedKv::attend`].
    pub fn attend(&self, [q, k, v]: [&Tensor; 3], batch: &PagedBatch, scale: f64, window: Option<i64>) -> Tensor {
        let parts: Vec<Tensor> = batch
            .sequences
            .iter()
            .map(|s| {
                let rows = |x: &Tensor| x.narrow(0, s.first_row as i64, s.num_rows as i64);
                let (keys, values) = self.append(s, &rows(k), &rows(v), &batch.tables[s.first_block..]);
                attention_with_past(&rows(q), &keys, &values, scale, window)
            })
            .collect();
        let first_rows: Vec<i64> =
            batch.sequences.iter().flat_map(|s| (s.first_row..s.first_row + s.num_rows).map(|i| i as i64)).collect();
        let at = Tensor::from_slice(&first_rows).to_device(q.device());
        q.zeros_like().index_copy(0, &at, &Tensor::cat(&parts, 0))
    }

    /// All keys and values of the sequence, those of the new tokens included.
    fn append(&self, s: &PagedSequence, k: &Tensor, v: &Tensor, table: &[i32]) -> (Tensor, Tensor) {
        let slot = |i: usize| i64::from(table[i / BLOCK_TOKENS]) * BLOCK_TOKENS as i64 + (i % BLOCK_TOKENS) as i64;
        let slots: Vec<i64> = (0..s.offset + s.num_rows).map(slot).collect();
        let slots = Tensor::from_slice(&slots).to_device(k.device());
        let new = slots.narrow(0, s.offset as i64, s.num_rows as i64);
        let _ = self.keys.shallow_clone().index_copy_(0, &new, k);
        let _ = self.values.shallow_clone().index_copy_(0, &new, v);
        (self.keys.index_select(0, &slots), self.values.index_select(0, &slots))
    }

    /// Copies a block.
    pub fn copy_block(&self, from: usize, to: usize) {
        for kept in [&self.keys, &self.values] {
            let block = |i: usize| kept.narrow(0, (i * BLOCK_TOKENS) as i64, BLOCK_TOKENS as i64);
            block(to).copy_(&block(from));
        }
    }
}
