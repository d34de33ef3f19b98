//! What generation keeps of the tokens it has seen: keys and values, layer by layer.

use tangelo_kernels::op;
use tch::{Device, Kind, Tensor};

/// Keys and values of earlier tokens, which those at hand are added to and attend to.
pub trait Past {
    /// Attention of layer `layer` (counted from the part's first) of the tokens at hand, `q [T, H, hd]`, `k` and `v`
    /// `[T, K, hd]` with positions applied, over their sequences so far: `[T, H, hd]`.
    fn attend(&mut self, layer: usize, qkv: [&Tensor; 3], scale: f64, window: Option<i64>) -> Tensor;
}

/// The past as one block sees it.
pub struct LayerPast<'a> {
    /// Of all layers.
    pub past: &'a mut dyn Past,
    /// Which.
    pub layer: usize,
}

impl LayerPast<'_> {
    /// See [`Past::attend`].
    pub fn attend(&mut self, qkv: [&Tensor; 3], scale: f64, window: Option<i64>) -> Tensor {
        self.past.attend(self.layer, qkv, scale, window)
    }
}

/// Keys and values of one layer, grown by doubling.
#[derive(Debug)]
pub struct LayerCache {
    /// `[capacity, K, head_dim]`
    keys: Tensor,
    /// `[capacity, K, head_dim]`
    values: Tensor,
    len: i64,
}

impl LayerCache {
    /// An empty cache.
    pub fn new(num_kv_heads: usize, head_dim: usize, kind: Kind, device: Device) -> LayerCache {
        let empty = || Tensor::zeros([64, num_kv_heads as i64, head_dim as i64], (kind, device));
        LayerCache { keys: empty(), values: empty(), len: 0 }
    }

    /// Appends `[T, K, head_dim]` keys and values; returns all of them so far, `[len, K, head_dim]`, as views.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let added = k.size()[0];
        self.reserve(self.len + added);
        for (kept, new) in [(&self.keys, k), (&self.values, v)] {
            kept.narrow(0, self.len, added).copy_(new);
        }
        self.len += added;
        (self.keys.narrow(0, 0, self.len), self.values.narrow(0, 0, self.len))
    }

    fn reserve(&mut self, needed: i64) {
        let capacity = self.keys.size()[0];
        if needed <= capacity {
            return;
        }
        let grown = needed.max(2 * capacity);
        for kept in [&mut self.keys, &mut self.values] {
            let mut size = kept.size();
            size[0] = grown;
            let larger = Tensor::zeros(size.as_slice(), (kept.kind(), kept.device()));
            larger.narrow(0, 0, self.len).copy_(&kept.narrow(0, 0, self.len));
            *kept = larger;
        }
    }
}

/// The state of one sequence being generated.
#[derive(Debug)]
pub struct DecodeState {
    /// Tokens seen so far.
    pub(crate) num_tokens: usize,
    /// One per block.
    pub(crate) layers: Vec<LayerCache>,
}

impl Past for DecodeState {
    fn attend(&mut self, layer: usize, [q, k, v]: [&Tensor; 3], scale: f64, window: Option<i64>) -> Tensor {
        let (keys, values) = self.layers[layer].append(k, v);
        op::attention_with_past(q, &keys, &values, scale, window)
    }
}

impl DecodeState {
    /// Tokens seen so far.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_keeps_what_was_there() {
        let mut cache = LayerCache::new(2, 4, Kind::Float, Device::Cpu);
        let all = Tensor::randn([200, 2, 4], (Kind::Float, Device::Cpu));
        let mut start = 0;
        for part in [1, 63, 1, 100, 35] {
            let new = all.narrow(0, start, part);
            let (k, v) = cache.append(&new, &(&new * 2.0));
            start += part;
            assert!(k.equal(&all.narrow(0, 0, start)));
            assert!(v.equal(&(all.narrow(0, 0, start) * 2.0)));
        }
    }
}
