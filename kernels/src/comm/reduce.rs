//! Reductions of whole parts, in ascending rank order.

use tch::{Kind, Tensor};

/// How values of the ranks are combined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum, in rank order, in fp32 for 16-bit types, rounded once.
    #[default]
    Sum,
    /// The largest value; NaN where any rank holds NaN.
    Max,
    /// The smallest value; NaN where any rank holds NaN.
    Min,
}

/// The type in which values of type `kind` are combined.
pub(crate) fn accumulation_kind(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    }
}

/// `output = ((parts[0] + parts[1]) + parts[2]) + ...`. Overwrites all parts but `own`; the output may be that part.
pub(crate) fn reduce_in_rank_order(
    parts: &[Tensor],
    own: Option<usize>,
    output: &Tensor,
    op: ReduceOp,
) -> Result<(), tch::TchError> {
    let kind = accumulation_kind(output.kind());
    let mut sum = first_operand(&parts[0], own == Some(0), output, kind)?;
    for part in &parts[1..] {
        let part = part.f_totype(kind)?;
        match op {
            ReduceOp::Sum => _ = sum.f_add_(&part)?,
            ReduceOp::Max => sum = sum.f_maximum(&part)?,
            ReduceOp::Min => sum = sum.f_minimum(&part)?,
        }
    }
    if sum.data_ptr() != output.data_ptr() {
        output.shallow_clone().f_copy_(&sum)?;
    }
    Ok(())
}

/// Rank 0's part where it may be added to: in place if it is scratch, in the output if that is of the right type.
fn first_operand(part: &Tensor, is_own: bool, output: &Tensor, kind: Kind) -> Result<Tensor, tch::TchError> {
    if part.kind() != kind {
        return part.f_totype(kind);
    }
    if !is_own {
        return Ok(part.shallow_clone());
    }
    if output.kind() != kind {
        return Ok(part.copy());
    }
    let mut output = output.shallow_clone();
    if output.data_ptr() != part.data_ptr() {
        output.f_copy_(part)?;
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bit_sums_are_rounded_once() {
        // 256 + 1 = 256 in bf16: rounding at every step would lose all the ones.
        let parts: Vec<Tensor> = [256.0, 1.0, 1.0, 1.0, 1.0]
            .iter()
            .map(|&v| Tensor::full([3], v, (Kind::BFloat16, tch::Device::Cpu)))
            .collect();
        let output = Tensor::zeros([3], (Kind::BFloat16, tch::Device::Cpu));
        reduce_in_rank_order(&parts, None, &output, ReduceOp::Sum).unwrap();
        assert_eq!(Vec::<f32>::try_from(output.to_kind(Kind::Float)).unwrap(), [260.0; 3]);
    }

    #[test]
    fn the_order_is_that_of_the_ranks() {
        let part = |v: f32| Tensor::from_slice(&[v]);
        let output = part(0.0);
        let check = |values: &[f32], op, want: f32| {
            let parts: Vec<Tensor> = values.iter().map(|&v| part(v)).collect();
            reduce_in_rank_order(&parts, None, &output, op).unwrap();
            assert_eq!(output.double_value(&[0]) as f32, want);
        };
        check(&[1e8, -1e8, 1.0], ReduceOp::Sum, 1.0);
        check(&[1.0, 1e8, -1e8], ReduceOp::Sum, 0.0);
        check(&[1.0, 5.0, -3.0], ReduceOp::Max, 5.0);
        check(&[1.0, 5.0, -3.0], ReduceOp::Min, -3.0);
    }

    #[test]
    fn the_own_part_is_kept_unless_it_is_the_output() {
        let part = |v: f32| Tensor::from_slice(&[v]);
        for own in 0..3 {
            let parts = [part(1.0), part(2.0), part(4.0)];
            let output = part(0.0);
            reduce_in_rank_order(&parts, Some(own), &output, ReduceOp::Sum).unwrap();
            assert_eq!((output.double_value(&[0]), parts[own].double_value(&[0])), (7.0, f64::from(1 << own)));
            let parts = [part(1.0), part(2.0), part(4.0)];
            reduce_in_rank_order(&parts, Some(own), &parts[own], ReduceOp::Sum).unwrap();
            assert_eq!(parts[own].double_value(&[0]), 7.0);
        }
    }
}
