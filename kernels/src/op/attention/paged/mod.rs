//! Keys and values of many sequences in blocks of memory, and the attention of their new tokens over them.
//!
//! On a CPU, blocks hold keys and values the way the attention kernel multiplies them, and the kernel goes over the same
//! tiles in the same order as [`super::attention`] does for a whole document: an output has the same bits. Elsewhere,
//! and for float64, blocks are rows of plain tensors and each sequence is one attention with a past.
//!
//! Deliberately absent: who owns which block. The caller says so with every call; a block may be in many tables as long as
//! nobody writes to it.
#![allow(unsafe_code)]

pub mod plain;

use tch::{Device, Kind, Tensor};

use crate::{ffi, op::has_cpu_kernels};
use plain::PlainBlocks;

/// Tokens of a block: the keys of one tile of attention.
pub const BLOCK_TOKENS: usize = 64;

/// The keys and values of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// K.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// New tokens of one sequence: rows `first_row` to `first_row + num_rows` of q, k and v, behind `offset` earlier tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedSequence {
    /// First row.
    pub first_row: usize,
    /// Rows.
    pub num_rows: usize,
    /// Tokens whose keys and values lie in blocks already.
    pub offset: usize,
    /// Where the sequence's blocks begin in [`PagedBatch::tables`]; enough for all its tokens.
    pub first_block: usize,
}

/// Where the new tokens of a step belong.
#[derive(Clone, Debug, Default)]
pub struct PagedBatch {
    /// The sequences, whose rows do not overlap.
    pub sequences: Vec<PagedSequence>,
    /// Blocks of all sequences, one after another.
    pub tables: Vec<i32>,
}

/// Memory for keys and values of all layers; blocks are counted per layer, and a token has the same block in each.
#[derive(Debug)]
pub struct PagedKv {
    layers: Vec<Layer>,
    num_blocks: usize,
}

#[derive(Debug)]
enum Layer {
    /// `[blocks, K, floats of a page]`, as the CPU kernel packs them.
    Packed(Tensor),
    Plain(PlainBlocks),
}

impl PagedKv {
    /// Memory for `num_blocks` blocks. It comes straight from the system on a CPU, and goes back when dropped.
    pub fn new(layers: &[LayerShape], num_blocks: usize, kind: Kind, device: Device) -> PagedKv {
        let packed = has_cpu_kernels(&Tensor::empty([0], (kind, device)));
        let layer = |shape: &LayerShape| {
            if packed {
                Layer::Packed(mapped_pages(shape, num_blocks, kind))
            } else {
                Layer::Plain(PlainBlocks::new(shape, num_blocks, kind, device))
            }
        };
        PagedKv { layers: layers.iter().map(layer).collect(), num_blocks }
    }

    /// Bytes that one block takes in all layers together.
    pub fn bytes_per_block(layers: &[LayerShape], kind: Kind, device: Device) -> usize {
        let packed = has_cpu_kernels(&Tensor::empty([0], (kind, device)));
        let bytes = |shape: &LayerShape| {
            if packed {
                shape.num_kv_heads * page_floats(shape.head_dim, kind) * size_of::<f32>()
            } else {
                2 * BLOCK_TOKENS * shape.num_kv_heads * shape.head_dim * kind.elt_size_in_bytes()
            }
        };
        layers.iter().map(bytes).sum()
    }

    /// Blocks of each layer.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Appends `k`, `v` `[T, K, hd]` of new tokens to their sequences and attends from `q [T, H, hd]`: `[T, H, hd]`.
    /// A token sees its sequence up to itself, with a window at most so many tokens.
    pub fn attend(
        &self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        batch: &PagedBatch,
        scale: f64,
        window: Option<i64>,
    ) -> Tensor {
        match &self.layers[layer] {
            Layer::Packed(pages) => packed_attention(pages, [q, k, v], batch, scale, window),
            Layer::Plain(blocks) => tch::no_grad(|| blocks.attend([q, k, v], batch, scale, window)),
        }
    }

    /// Copies a block of every layer.
    pub fn copy_block(&self, from: usize, to: usize) {
        for layer in &self.layers {
            match layer {
                Layer::Packed(pages) => pages.get(to as i64).copy_(&pages.get(from as i64)),
                Layer::Plain(blocks) => blocks.copy_block(from, to),
            }
        }
    }
}

fn page_floats(head_dim: usize, kind: Kind) -> usize {
    let (of_kind, mut floats) = (Tensor::empty([0], (kind, Device::Cpu)), 0);
    // SAFETY: the tensor outlives the call; `floats` is writable.
    ffi::check(unsafe { ffi::tangelo_page_floats(ffi::borrow(&of_kind), head_dim as i64, &mut floats) });
    floats as usize
}

fn mapped_pages(shape: &LayerShape, num_blocks: usize, kind: Kind) -> Tensor {
    let size = [num_blocks as i64, shape.num_kv_heads as i64, page_floats(shape.head_dim, kind) as i64];
    // SAFETY: the shim gives away a tensor that owns its memory.
    let [flat] = ffi::produce(|[out]| unsafe { ffi::tangelo_mapped_floats(size.iter().product(), out) });
    flat.view(size)
}

fn packed_attention(
    pages: &Tensor,
    [q, k, v]: [&Tensor; 3],
    batch: &PagedBatch,
    scale: f64,
    window: Option<i64>,
) -> Tensor {
    let sequence = |s: &PagedSequence| ffi::PagedSequence {
        first_row: s.first_row as i64,
        num_rows: s.num_rows as i64,
        offset: s.offset as i64,
        first_page: s.first_block as i64,
    };
    let sequences: Vec<ffi::PagedSequence> = batch.sequences.iter().map(sequence).collect();
    let window = window.unwrap_or(i64::MAX);
    assert!(window > 0, "attention: a window of {window} tokens");
    // SAFETY: all pointers outlive the call and come with their lengths; the shim checks blocks and rows.
    let [out] = ffi::produce(|[out]| unsafe {
        ffi::tangelo_paged_attention(
            ffi::borrow(q),
            ffi::borrow(k),
            ffi::borrow(v),
            ffi::borrow(pages),
            sequences.as_ptr(),
            sequences.len(),
            batch.tables.as_ptr(),
            batch.tables.len(),
            scale,
            window,
            out,
        )
    });
    out
}
