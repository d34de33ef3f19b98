//! The weights of one unit: a flat buffer and views of it.

use std::collections::HashMap;
use std::ops::Range;
use tangelo_core::{IndexBox, ParamMeta};
use tangelo_kernels::autograd;
use tangelo_kernels::device::lasting_zeros;
use tch::{Device, Kind, Tensor};

/// A weight and where its gradient accumulates.
#[derive(Debug)]
pub struct Weight {
    /// The values: a view of the unit's flat buffer.
    pub value: Tensor,
    /// The fp32 gradient, a view of the unit's flat gradient; `None` where nothing is trained.
    pub main_grad: Option<Tensor>,
}

impl Weight {
    /// Another handle to the same memory.
    pub fn share(&self) -> Weight {
        Weight { value: self.value.shallow_clone(), main_grad: self.main_grad.as_ref().map(Tensor::shallow_clone) }
    }

    /// The gradient buffer by reference.
    pub fn grad(&self) -> Option<&Tensor> {
        self.main_grad.as_ref()
    }
}

/// Where a parameter, or the part of it that this rank computes with, lies in its unit's flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpan {
    /// Name, full shape.
    pub meta: ParamMeta,
    /// The part of it, in the coordinates of the full tensor.
    pub held: IndexBox,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

impl ParamSpan {
    /// Length per dim of the part that is held.
    pub fn shape(&self) -> Vec<usize> {
        self.held.shape()
    }

    /// Elements per index of dim 0 of the part that is held.
    pub fn row_len(&self) -> usize {
        self.held.ranges[1..].iter().map(|r| r.len()).product()
    }

    /// Where a box of the parameter lies in the flat buffer: whole rows of the part that is held.
    pub fn flat_range(&self, rows: &IndexBox) -> Range<usize> {
        if rows.is_empty() {
            return self.offset..self.offset;
        }
        let inside = rows.relative_to(&self.held);
        debug_assert!(inside.ranges[1..].iter().zip(&self.held.ranges[1..]).all(|(a, b)| a.len() == b.len()));
        let row_len = self.row_len();
        self.offset + inside.ranges[0].start * row_len..self.offset + inside.ranges[0].end * row_len
    }

    /// Lays parts of parameters end to end in the order given.
    pub fn lay_out(parts: Vec<(ParamMeta, IndexBox)>) -> Vec<ParamSpan> {
        let mut offset = 0;
        let place = |(meta, held): (ParamMeta, IndexBox)| {
            let len = held.volume();
            let span = ParamSpan { meta, held, offset, len };
            offset += len;
            span
        };
        parts.into_iter().map(place).collect()
    }
}

/// A unit's parameters in one flat buffer, `[n]`, in execution order.
#[derive(Debug)]
pub struct UnitWeights {
    spans: Vec<ParamSpan>,
    by_name: HashMap<String, usize>,
    flat: Tensor,
    main_grad: Option<Tensor>,
}

impl UnitWeights {
    /// Zeroed weights of type `kind`, with an fp32 gradient buffer where `trained`.
    pub fn zeros(parts: Vec<(ParamMeta, IndexBox)>, kind: Kind, device: Device, trained: bool) -> UnitWeights {
        let spans = ParamSpan::lay_out(parts);
        let n: usize = spans.iter().map(|s| s.len).sum();
        let by_name = spans.iter().enumerate().map(|(i, s)| (s.meta.name.clone(), i)).collect();
        let flat = lasting_zeros(n, kind, device);
        // Gradients are wider than the weights where those are bf16, and as wide as them in float64 checks.
        let grad_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let main_grad = trained.then(|| lasting_zeros(n, grad_kind, device));
        UnitWeights { spans, by_name, flat, main_grad }
    }

    /// Weights that lie in `flat`, `[n]`, which somebody else owns and updates; nothing is trained.
    pub fn over(parts: Vec<(ParamMeta, IndexBox)>, flat: Tensor) -> UnitWeights {
        let spans = ParamSpan::lay_out(parts);
        let n: usize = spans.iter().map(|s| s.len).sum();
        assert_eq!(flat.size(), [n as i64], "a buffer of another size than the parameters");
        let by_name = spans.iter().enumerate().map(|(i, s)| (s.meta.name.clone(), i)).collect();
        UnitWeights { spans, by_name, flat, main_grad: None }
    }

    /// The parameters in order.
    pub fn spans(&self) -> &[ParamSpan] {
        &self.spans
    }

    /// The flat buffer `[n]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The flat fp32 gradient `[n]`.
    pub fn main_grad(&self) -> Option<&Tensor> {
        self.main_grad.as_ref()
    }

    /// Gives the memory of the weights back, or takes it again with undefined contents. Views stay views: graphs may hold
    /// them, and find the same values once the buffer was refilled inside [`autograd::preserving_version`].
    pub fn hold_weights(&self, held: bool) {
        autograd::storage_resize(&self.flat, if held { self.num_bytes(&self.flat) } else { 0 });
    }

    /// The same for gradients; those taken are zero.
    pub fn hold_gradients(&self, held: bool) {
        if let Some(grad) = &self.main_grad {
            autograd::storage_resize(grad, if held { self.num_bytes(grad) } else { 0 });
            if held {
                let _ = grad.shallow_clone().zero_();
            }
        }
    }

    fn num_bytes(&self, flat: &Tensor) -> usize {
        self.len() * flat.kind().elt_size_in_bytes()
    }

    /// Number of elements.
    #[allow(clippy::len_without_is_empty)] // a unit has parameters
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, |s| s.offset + s.len)
    }

    /// The span of a parameter, by its full name.
    pub fn span(&self, name: &str) -> Option<&ParamSpan> {
        self.by_name.get(name).map(|&i| &self.spans[i])
    }

    /// One parameter by full name. Panics where the unit has no such parameter: names come from the model's own spec.
    pub fn weight(&self, name: &str) -> Weight {
        self.fused(&[name])
    }

    /// One parameter's values alone, which must be held; its gradient need not be.
    pub fn value(&self, name: &str) -> Tensor {
        let span = self.span(name).unwrap_or_else(|| panic!("the unit has no parameter {name}"));
        let shape: Vec<i64> = span.shape().iter().map(|&n| n as i64).collect();
        self.flat.narrow(0, span.offset as i64, span.len as i64).view(shape.as_slice())
    }

    /// Parameters that lie next to each other and agree in all dims but the first, as one: rows concatenated.
    pub fn fused(&self, names: &[&str]) -> Weight {
        let spans: Vec<&ParamSpan> =
            names.iter().map(|n| self.span(n).unwrap_or_else(|| panic!("the unit has no parameter {n}"))).collect();
        for pair in spans.windows(2) {
            assert_eq!(pair[0].offset + pair[0].len, pair[1].offset, "{names:?} are not adjacent");
            assert_eq!(pair[0].shape()[1..], pair[1].shape()[1..], "{names:?} differ beyond dim 0");
        }
        let rows: usize = spans.iter().map(|s| s.shape()[0]).sum();
        let mut shape: Vec<i64> = spans[0].shape().iter().map(|&n| n as i64).collect();
        shape[0] = rows as i64;
        let (offset, len) = (spans[0].offset as i64, shape.iter().product::<i64>());
        let view = |flat: &Tensor| flat.narrow(0, offset, len).view(shape.as_slice());
        Weight { value: view(&self.flat), main_grad: self.main_grad.as_ref().map(view) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_core::DType;

    fn meta(name: &str, shape: &[usize]) -> (ParamMeta, IndexBox) {
        (ParamMeta { name: name.into(), shape: shape.into(), dtype: DType::F32 }, IndexBox::full(shape))
    }

    #[test]
    fn fused_weights_share_the_flat_buffer() {
        let metas = vec![meta("n", &[3]), meta("q", &[2, 3]), meta("k", &[1, 3])];
        let unit = UnitWeights::zeros(metas, Kind::BFloat16, Device::Cpu, true);
        let mut qk = unit.fused(&["q", "k"]);
        assert_eq!(qk.value.size(), [3, 3]);
        let _ = qk.value.fill_(1.0);
        assert_eq!(unit.flat().sum(Kind::Float).double_value(&[]), 9.0);
        assert_eq!(unit.weight("n").value.sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(qk.main_grad.unwrap().kind(), Kind::Float);
    }

    #[test]
    #[should_panic(expected = "not adjacent")]
    fn fusing_strangers_is_our_bug() {
        let metas = vec![meta("q", &[2, 3]), meta("n", &[3]), meta("k", &[1, 3])];
        let _ = UnitWeights::zeros(metas, Kind::Float, Device::Cpu, false).fused(&["q", "k"]);
    }
}
