//! How values are coded in files, and decoding them to f32.
//!
//! Values are coded in blocks along the innermost dim: one value per block for plain floats, 32 for the quantised
//! types of GGUF. Block layouts: ggml's `ggml-quants` (<https://github.com/ggml-org/ggml>). All are little-endian.
//! Decoding rounds once per operation, in the order ggml's own decoder multiplies and adds.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use tangelo_core::DType;

/// Values per block of the quantised types.
const QUANT_BLOCK: usize = 32;

/// How the values of a stored tensor are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
    /// 32 signed bytes q and a binary16 scale d: d q.
    Q8_0,
    /// 32 four-bit q and a binary16 scale d: d (q - 8).
    Q4_0,
    /// 32 four-bit q, a binary16 scale d and a binary16 minimum m: d q + m.
    Q4_1,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Encoding; 7] =
        [Encoding::F64, Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_1];

    /// Values per block.
    pub const fn block_values(self) -> usize {
        match self {
            Encoding::F64 | Encoding::F32 | Encoding::F16 | Encoding::BF16 => 1,
            Encoding::Q8_0 | Encoding::Q4_0 | Encoding::Q4_1 => QUANT_BLOCK,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Encoding::F64 => 8,
            Encoding::F32 => 4,
            Encoding::F16 | Encoding::BF16 => 2,
            Encoding::Q8_0 => 2 + QUANT_BLOCK,
            Encoding::Q4_0 => 2 + QUANT_BLOCK / 2,
            Encoding::Q4_1 => 4 + QUANT_BLOCK / 2,
        }
    }

    /// The element type a tensor of this encoding has for the rest of the program: what decodes without loss. A
    /// quantised tensor reads as F32.
    pub const fn dtype(self) -> DType {
        match self {
            Encoding::F64 => DType::F64,
            Encoding::F16 => DType::F16,
            Encoding::BF16 => DType::BF16,
            Encoding::F32 | Encoding::Q8_0 | Encoding::Q4_0 | Encoding::Q4_1 => DType::F32,
        }
    }

    /// Bytes of `values` values, `None` where that is no whole number of blocks or does not fit.
    pub fn bytes_of(self, values: usize) -> Option<usize> {
        let whole = values.is_multiple_of(self.block_values());
        (values / self.block_values()).checked_mul(self.block_bytes()).filter(|_| whole)
    }

    /// Decodes whole blocks into `out`. Both slices must hold the same number of blocks.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(self.bytes_of(out.len()), Some(bytes.len()), "{self:?}: {} values", out.len());
        match self {
            Encoding::F64 => each(bytes, out, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
            Encoding::F32 => each(bytes, out, f32::from_le_bytes),
            Encoding::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Encoding::F16 => decode_f16(bytes, out),
            Encoding::Q8_0 => blocks(self, bytes, out, decode_q8_0),
            Encoding::Q4_0 => blocks(self, bytes, out, decode_q4_0),
            Encoding::Q4_1 => blocks(self, bytes, out, decode_q4_1),
        }
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *o = value(*b);
    }
}

/// Through a small buffer, because files need not align values and the conversion of slices uses the CPU's.
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut buffer = [f16::ZERO; 256];
    for (bytes, out) in bytes.chunks(512).zip(out.chunks_mut(256)) {
        let values = &mut buffer[..out.len()];
        for (v, b) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *v = f16::from_le_bytes(*b);
        }
        values.convert_to_f32_slice(out);
    }
}

fn blocks(encoding: Encoding, bytes: &[u8], out: &mut [f32], block: impl Fn(&[u8], &mut [f32])) {
    for (b, o) in bytes.chunks_exact(encoding.block_bytes()).zip(out.chunks_exact_mut(QUANT_BLOCK)) {
        block(b, o);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (o, &q) in out.iter_mut().zip(&block[2..]) {
        *o = d * f32::from(q as i8);
    }
}

/// The low halves of the bytes are the first 16 values, the high halves the last 16.
fn nibbles(packed: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(QUANT_BLOCK / 2);
    for ((&q, l), h) in packed.iter().zip(low).zip(high) {
        *l = value(q & 0x0F);
        *h = value(q >> 4);
    }
}

fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], out, |q| d * (f32::from(q) - 8.0));
}

fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], out, |q| d * f32::from(q) + m);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(encoding: Encoding, bytes: &[u8], expected: &[f32]) {
        let mut out = vec![f32::NAN; expected.len()];
        encoding.decode(bytes, &mut out);
        assert_eq!(out, expected, "{encoding:?}");
    }

    #[test]
    fn plain_floats_decode_to_themselves() {
        let values = [0.0f32, -1.5, 3.0e-5, 65504.0, f32::INFINITY];
        check(Encoding::F32, &values.map(f32::to_le_bytes).concat(), &values);
        check(Encoding::F64, &values.map(|v| f64::from(v).to_le_bytes()).concat(), &values);
        let halves = values.map(f16::from_f32);
        check(Encoding::F16, &halves.map(f16::to_le_bytes).concat(), &halves.map(f16::to_f32));
        let brains = values.map(bf16::from_f32);
        check(Encoding::BF16, &brains.map(bf16::to_le_bytes).concat(), &brains.map(bf16::to_f32));
    }

    #[test]
    fn every_half_decodes_alike_alone_and_in_slices() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = all.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = vec![0.0; all.len()];
        Encoding::F16.decode(&bytes, &mut out);
        for (bits, o) in all.iter().zip(&out) {
            let expected = f16::from_bits(*bits).to_f32();
            assert!(o.to_bits() == expected.to_bits() || (o.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn quantised_blocks_follow_their_formulas() {
        let d = f16::from_f32(0.25).to_le_bytes();
        let m = f16::from_f32(-2.0).to_le_bytes();
        let q: Vec<u8> = (0..32).map(|i| (i as i8 - 16) as u8).collect();
        let expected: Vec<f32> = (0..32).map(|i| 0.25 * (i as f32 - 16.0)).collect();
        check(Encoding::Q8_0, &[&d[..], &q].concat(), &expected);

        let packed: Vec<u8> = (0..16).map(|i| i | ((15 - i) << 4)).collect();
        let nibbles: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| q as f32).collect();
        let q4_0: Vec<f32> = nibbles.iter().map(|q| 0.25 * (q - 8.0)).collect();
        check(Encoding::Q4_0, &[&d[..], &packed].concat(), &q4_0);
        let q4_1: Vec<f32> = nibbles.iter().map(|q| 0.25 * q - 2.0).collect();
        check(Encoding::Q4_1, &[&d[..], &m, &packed].concat(), &q4_1);
    }

    #[test]
    fn bytes_count_whole_blocks_only() {
        assert_eq!(Encoding::Q4_1.bytes_of(64), Some(40));
        assert_eq!(Encoding::Q4_1.bytes_of(33), None);
        assert_eq!(Encoding::F64.bytes_of(usize::MAX), None);
    }
}
