//! Attention over blocks: the same bits as over whole documents, whatever the pieces, the batch and the blocks.

use tangelo_kernels::op::attention::paged::{BLOCK_TOKENS, LayerShape, PagedSequence};
use tangelo_kernels::op::{self, PagedBatch, PagedKv};
use tch::{Device, Kind, Tensor};

use crate::common::*;

const SCALE: f64 = 0.25;

struct Document {
    qkv: [Tensor; 3],
    expected: Tensor,
    length: usize,
    done: usize,
    table: Vec<i32>,
}

impl Document {
    fn rows(&self, which: usize, count: usize) -> Tensor {
        self.qkv[which].narrow(0, self.done as i64, count as i64)
    }
}

struct Shape {
    heads: i64,
    kv_heads: i64,
    dim: i64,
    window: Option<i64>,
}

fn document(shape: &Shape, kind: Kind, length: usize, blocks: &mut Vec<i32>) -> Document {
    let random = |heads: i64| random(&[length as i64, heads, shape.dim], kind);
    let qkv = [random(shape.heads), random(shape.kv_heads), random(shape.kv_heads)];
    let expected = op::attention(&qkv[0], &qkv[1], &qkv[2], &[0, length as i64], SCALE, shape.window);
    let table = blocks.split_off(blocks.len() - length.div_ceil(BLOCK_TOKENS));
    Document { qkv, expected, length, done: 0, table }
}

/// Feeds every document in pieces of random sizes beside pieces of others.
fn check(shape: &Shape, kind: Kind, lengths: &[usize], largest: i64) {
    let num_blocks = 3 + lengths.iter().map(|n| n.div_ceil(BLOCK_TOKENS)).sum::<usize>();
    let order =
        Vec::<i64>::try_from(Tensor::randperm(num_blocks as i64, (Kind::Int64, Device::Cpu))).expect("block numbers");
    let mut blocks: Vec<i32> = order.into_iter().map(|b| b as i32).collect();
    let layer = LayerShape { num_kv_heads: shape.kv_heads as usize, head_dim: shape.dim as usize };
    let kv = PagedKv::new(&[layer, layer], num_blocks, kind, Device::Cpu);
    let mut documents: Vec<Document> = lengths.iter().map(|&n| document(shape, kind, n, &mut blocks)).collect();
    while documents.iter().any(|d| d.done < d.length) {
        let pieces: Vec<(usize, usize)> = (0..documents.len())
            .map(|i| (i, (below(largest) as usize).min(documents[i].length - documents[i].done)))
            .filter(|&(_, count)| count > 0)
            .collect();
        if pieces.is_empty() {
            continue;
        }
        let mut batch = PagedBatch::default();
        let mut first_row = 0;
        for &(i, num_rows) in &pieces {
            let (offset, first_block) = (documents[i].done, batch.tables.len());
            batch.sequences.push(PagedSequence { first_row, num_rows, offset, first_block });
            batch.tables.extend(&documents[i].table);
            first_row += num_rows;
        }
        let packed =
            |which| Tensor::cat(&pieces.iter().map(|&(i, n)| documents[i].rows(which, n)).collect::<Vec<_>>(), 0);
        let [q, k, v] = [packed(0), packed(1), packed(2)];
        let out = kv.attend(1, [&q, &k, &v], &batch, SCALE, shape.window);
        for (&(i, n), place) in pieces.iter().zip(&batch.sequences) {
            let document = &mut documents[i];
            let got = out.narrow(0, place.first_row as i64, n as i64);
            let expected = document.expected.narrow(0, document.done as i64, n as i64);
            if kind == Kind::Double {
                assert_close("plain blocks", &got, &expected, 1e-12);
            } else {
                assert_same_bits("blocks", &got, &expected);
            }
            document.done += n;
        }
    }
}

#[test]
fn blocks_give_the_bits_of_whole_documents() {
    seed_freshly();
    let shapes = [
        Shape { heads: 9, kv_heads: 3, dim: 64, window: None },
        Shape { heads: 4, kv_heads: 4, dim: 16, window: Some(70) },
        Shape { heads: 6, kv_heads: 2, dim: 10, window: Some(5) },
        Shape { heads: 8, kv_heads: 1, dim: 7, window: None },
    ];
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        for shape in &shapes {
            for largest in [2, 40, 200] {
                check(shape, kind, &[1, 64, 65, 130, 200], largest);
            }
        }
    }
}

#[test]
fn a_block_that_held_infinities_is_clean_for_its_next_owner() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let kv = PagedKv::new(&[LayerShape { num_kv_heads: 1, head_dim: 16 }], 1, kind, Device::Cpu);
        let infinite = Tensor::full([64, 1, 16], f64::INFINITY, (kind, Device::Cpu));
        let x = random(&[3, 1, 16], kind);
        for (k, v) in [(&infinite, &infinite), (&x, &x)] {
            let num_rows = k.size()[0] as usize;
            let sequences = vec![PagedSequence { first_row: 0, num_rows, offset: 0, first_block: 0 }];
            let out = kv.attend(0, [k, k, v], &PagedBatch { sequences, tables: vec![0] }, SCALE, None);
            if num_rows == 3 {
                assert_same_bits("clean", &out, &op::attention(&x, &x, &x, &[0, 3], SCALE, None));
            }
        }
    }
}

#[test]
fn copied_blocks_are_apart() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let kv = PagedKv::new(&[LayerShape { num_kv_heads: 2, head_dim: 16 }], 2, kind, Device::Cpu);
        let (x, y) = (random(&[5, 2, 16], kind), random(&[1, 2, 16], kind));
        let attend = |rows: &Tensor, offset: usize, block: i32| {
            let num_rows = rows.size()[0] as usize;
            let sequences = vec![PagedSequence { first_row: 0, num_rows, offset, first_block: 0 }];
            kv.attend(0, [rows, rows, rows], &PagedBatch { sequences, tables: vec![block] }, SCALE, None)
        };
        let _ = attend(&x, 0, 0);
        kv.copy_block(0, 1);
        let (first, second) = (attend(&y, 5, 1), attend(&random(&[1, 2, 16], kind), 5, 0));
        assert!(!first.equal(&second));
        assert!(attend(&y, 5, 0).equal(&first), "the copy has the same tokens");
    }
}

#[test]
fn blocks_outside_the_memory_are_refused() {
    let kv = PagedKv::new(&[LayerShape { num_kv_heads: 1, head_dim: 16 }], 2, Kind::Float, Device::Cpu);
    let x = random(&[1, 1, 16], Kind::Float);
    let try_with = |offset, tables: Vec<i32>| {
        let sequences = vec![PagedSequence { first_row: 0, num_rows: 1, offset, first_block: 0 }];
        refusal(|| kv.attend(0, [&x, &x, &x], &PagedBatch { sequences, tables }, SCALE, None))
    };
    assert!(try_with(0, vec![2]).contains("page 2 of 2"));
    assert!(try_with(64, vec![0]).contains("sequence 0 of rows 0 + 1 behind 64 tokens"));
}

#[test]
fn memory_goes_back_to_the_system() {
    tangelo_kernels::device::keep_freed_memory();
    let shape = [LayerShape { num_kv_heads: 4, head_dim: 64 }];
    let resident = || tangelo_kernels::device::memory().resident_bytes;
    let (before, num_blocks) = (resident(), 1024);
    let bytes = (num_blocks * PagedKv::bytes_per_block(&shape, Kind::Float, Device::Cpu)) as u64;
    let kv = PagedKv::new(&shape, num_blocks, Kind::Float, Device::Cpu);
    (1..num_blocks).for_each(|block| kv.copy_block(0, block));
    let full = resident();
    drop(kv);
    // Half of it is far more than anything else here takes meanwhile.
    assert!(full - before > bytes / 2, "{before} -> {full}: {bytes} bytes were never taken");
    assert!(full - resident() > bytes / 2, "{full} -> {}: the memory was kept", resident());
}
