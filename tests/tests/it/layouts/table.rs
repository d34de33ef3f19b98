//! The layouts. A word each for what differs from one rank:
//! `rep dp cp tp pp` degrees; `heads` the inner part of cp; `ring` rotates keys instead of gathering them;
//! `z1.2.4` scopes of parameters, gradients and states; `never` keeps gathered weights; `gpipe`; `stages1.3` layers;
//! `full attn ffn mixed` what is recomputed; `muon` the optimizer of hidden matrices; first the model: `gqa` (8 heads on
//! 4, tied, a window), `mha` (untied), `odd` (8 heads on 2, biases), `qwen` (8 heads on 4, norms of heads).

/// One layout per line.
pub const LAYOUTS: &str = "
    gqa
    mha
    odd
    gqa full
    gqa attn
    gqa ffn
    mha mixed
    gqa dp2
    gqa dp4
    mha rep2
    gqa dp2 z1.1.1
    gqa dp2 z1.2.2
    gqa dp4 z1.2.4
    gqa dp2 z2.2.2
    mha dp4 z4.4.4
    odd dp4 z2.2.4
    gqa dp4 z2.4.4 never
    gqa dp4 z2.2.2
    mha rep2 dp2 z2.2.2
    gqa dp8 z2.4.8
    gqa tp2
    mha tp2
    odd tp2
    gqa tp4
    gqa tp8
    mha tp4
    gqa cp2 heads2
    mha cp2 heads2
    gqa cp4 heads4
    gqa cp8 heads8
    gqa cp2
    mha cp2
    gqa cp4
    gqa cp2 ring
    mha cp2 ring
    odd cp3 ring
    gqa cp4 ring
    gqa cp4 heads2 ring
    mha cp4 heads2
    gqa cp8 heads4 ring
    gqa pp2
    mha pp2
    odd pp2 gpipe
    gqa pp2 stages1.3
    gqa pp4
    mha pp3 stages1.2.1
    gqa pp4 gpipe
    gqa dp2 tp2
    mha dp2 tp2 z2.2.2
    gqa dp2 cp2 ring
    gqa dp2 cp2 z2.2.4 heads2
    gqa dp2 pp2
    mha dp2 pp2 z2.2.2
    gqa dp2 pp2 z2.2.2 never gpipe
    gqa tp2 cp2
    mha tp2 cp2 ring
    odd tp2 cp2 heads2
    gqa tp2 pp2
    mha tp2 pp2 gpipe
    gqa cp2 pp2 ring
    mha cp2 pp2 heads2
    gqa tp2 full
    gqa tp2 attn
    mha cp2 ring full
    gqa cp2 heads2 mixed
    gqa pp2 full
    gqa dp2 z2.2.2 full
    gqa dp2 tp2 pp2
    mha dp2 tp2 cp2 ring z2.4.4
    gqa dp2 cp2 pp2 heads2 z2.2.4
    odd tp2 cp2 pp2 ring
    gqa rep2 dp2 tp2 z2.2.2
    mha rep2 cp2 tp2 z1.2.2 mixed
    gqa tp2 cp4 heads2 ring full
    gqa tp4 cp2 heads2
    gqa dp2 cp2 tp2 z4.4.4 heads2 full
    odd dp2 tp2 pp2 z2.2.2 mixed
    gqa rep4
    gqa rep2 dp4 z1.2.2
    gqa rep2 pp2
    mha rep2 cp2 ring
    gqa rep2 cp2 heads2
    gqa cp2 pp2
    mha dp2 cp2 z4.4.4
    odd tp2 pp2 stages1.3 gpipe
    gqa dp2 pp4 z2.2.2 stages1.1.1.1
    qwen
    qwen tp2
    qwen tp8
    qwen cp2 heads2
    qwen cp2 ring
    qwen pp2 full
    qwen dp4 z4.4.4
    qwen tp4 cp2 heads2
    gqa muon
    odd muon
    gqa muon tp2 full
    mha muon cp2
    gqa muon dp2
    gqa muon dp4 z1.2.4
    mha muon dp4 z4.4.4
    gqa muon dp8 z2.4.8
    mha muon tp2
    odd muon tp4
    gqa muon tp8
    gqa muon pp2
    mha muon cp2 ring
    gqa muon dp2 cp2 z2.2.4 heads2
    gqa muon dp2 tp2 pp2 z2.2.2
    odd muon rep2 dp2 tp2 z2.2.2
    mha muon dp2 tp2 cp2 ring z1.2.4
";
