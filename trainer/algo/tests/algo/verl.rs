//! Against the numbers of verl 0.9.1's own functions (advantages, rollout correction), run once in float64.
//!
//! Eight sequences of four prompts, one of them alone, with holes in masks and a completion of one token. Inputs are
//! exact in binary. verl adds 1e-8 to its counts and takes standard deviations in float32, so numbers agree to 1e-6.

use crate::make::{Sequence, algorithm, batch, column, score};
use tangelo_core::Column;

const TOLERANCE: f64 = 2e-6;

fn rows() -> Vec<Sequence> {
    let masks = ["1111100", "1101100", "1000000", "1110111", "1111111", "1100000", "1111110", "1011010"];
    let rewards = [1.0, 0.0, 0.25, 0.5, -0.5, 1.25, 2.0, 0.75];
    let groups = [0, 0, 0, 1, 1, 2, 2, 3];
    let stream = |of: &dyn Fn(usize) -> f32| (0..7).map(of).collect::<Vec<f32>>();
    (0..8)
        .map(|i| {
            let old = stream(&|t| -(((5 * i + 2 * t) % 11) as f32 / 8.0 + 0.125));
            Sequence {
                rollout: stream(&|t| old[t] + (((i + 2 * t) % 5) as f32 - 2.0) / 16.0),
                reference: stream(&|t| -(((3 * i + 4 * t) % 13) as f32 / 8.0 + 0.125)),
                value: stream(&|t| ((7 * i + 3 * t) % 16) as f32 / 16.0 - 0.5),
                old,
                ..Sequence::plain(groups[i], rewards[i], masks[i])
            }
        })
        .collect()
}

/// The KL in the reward that the numbers were made with.
const KL: &str = "
    [reward]
    use_kl_in_reward = true
    kl_penalty = 'low_var_kl'
    kl_ctrl = { type = 'fixed', kl_coef = 0.125 }
";

fn check(toml: &str, of: Column, expected: &[&[f64]]) {
    let algorithm = algorithm(toml);
    let outcome = score(&*algorithm, &algorithm.initial_state(), &[batch(&rows())]).unwrap();
    for (row, (found, expected)) in column(&outcome, of).iter().zip(expected).enumerate() {
        for (t, (&found, &expected)) in found.iter().zip(*expected).enumerate() {
            assert!(
                (f64::from(found) - expected).abs() < TOLERANCE,
                "{toml}\n{of} row {row} token {t}: {found} != {expected}"
            );
        }
    }
}

fn check_sequences(toml: &str, expected: &[f64]) {
    let spread: Vec<Vec<f64>> = rows()
        .iter()
        .zip(expected)
        .map(|(row, &a)| row.mask.iter().map(|&m| if m == 1.0 { a } else { 0.0 }).collect())
        .collect();
    check(toml, Column::Advantage, &spread.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

#[test]
fn grpo_and_dr_grpo() {
    check_sequences(
        "type = 'grpo'",
        &[1.12089492, -0.800639231, -0.320255692, 0.707105781, -0.707105781, -0.707105448, 0.707105448, 0.749999285],
    );
    check_sequences(
        &format!("type = 'grpo'\n{KL}"),
        &[1.11566328, -0.815644565, -0.300018712, 0.707105704, -0.707105704, -0.707105375, 0.707105375, 0.710248907],
    );
    check_sequences(
        "type = 'grpo'\nnorm_adv_by_std = false",
        &[0.583333333, -0.416666667, -0.166666667, 0.5, -0.5, -0.375, 0.375, 0.75],
    );
}

#[test]
fn rloo() {
    check_sequences("type = 'rloo'", &[0.875, -0.625, -0.25, 1.0, -1.0, -0.75, 0.75, 0.75]);
    check_sequences(
        &format!("type = 'rloo'\n{KL}"),
        &[0.819761889, -0.599315531, -0.220446358, 0.9283532, -0.9283532, -0.711163678, 0.711163678, 0.710249585],
    );
}

#[test]
fn ppo() {
    let ppo = format!("type = 'ppo'\ngamma = 0.99\nlam = 0.95\n{KL}");
    check(
        &ppo,
        Column::Advantage,
        &[
            &[0.7320014, 0.580622088, 0.426659735, 0.277763636, 0.140338851, 0.0, 0.0],
            &[-0.708300731, -0.939778061, 0.0, -0.161434393, -0.364737484, 0.0, 0.0],
            &[-0.896680752, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[-0.261966228, -0.446646668, -0.607604854, 0.0, 0.216298805, 0.133342089, -0.0527174551],
            &[-1.51706726, -1.79120572, -0.815673016, -1.0377784, -1.25052678, -1.49719528, -1.77538793],
            &[1.05392653, 0.926609767, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.824448791, 0.699674359, 1.82254902, 1.74146345, 1.65753914, 1.57944946, 0.0],
            &[0.481282246, 0.0, 0.113229842, -0.058934415, 0.0, 0.776436237, 0.0],
        ],
    );
    check(
        &ppo,
        Column::Return,
        &[
            &[0.712076644, 0.773572987, 0.832919282, 0.896482578, 0.969594255, 0.0, 0.0],
            &[-0.0492882071, -0.0544630835, 0.0, -0.0315928586, -0.0133163325, 0.0, 0.0],
            &[0.231409841, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.197227419, 0.231004888, 0.28452806, 0.0, 0.345321072, 0.463770358, 0.496399902],
            &[-0.409981524, -0.450666256, -0.451161718, -0.448535662, -0.438121116, -0.455940677, -0.5],
            &[1.16753759, 1.24906289, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.41402712, 1.49766857, 1.61981619, 1.73982297, 1.85746686, 1.97996732, 0.0],
            &[0.565885444, 0.0, 0.634529519, 0.678725089, 0.0, 0.749062887, 0.0],
        ],
    );
}

#[test]
fn reinforce_plus_plus() {
    check(
        &format!("type = 'reinforce_plus_plus'\ngamma = 0.9\n{KL}"),
        Column::Advantage,
        &[
            &[0.16565235, 0.263965638, 0.37908334, 0.522863243, 0.70627075, 0.0, 0.0],
            &[-0.743978569, -0.739787873, 0.0, -0.742079054, -0.738744096, 0.0, 0.0],
            &[-0.378962689, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[-0.484637366, -0.425855363, -0.318328917, 0.0, -0.243424535, -0.0623682266, 0.0106094417],
            &[-1.21614035, -1.25864099, -1.30586393, -1.33832932, -1.34753099, -1.38698239, -1.45423657],
            &[0.932001406, 1.11712839, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.973871761, 1.17832033, 1.39081608, 1.62692247, 1.88912986, 2.19165925, 0.0],
            &[0.0283202881, 0.0, 0.156778578, 0.270439012, 0.0, 0.382059062, 0.0],
        ],
    );
    check_sequences(
        &format!("type = 'reinforce_plus_plus'\nbaseline = true\n{KL}"),
        &[0.882530159, -1.15510347, -0.61109047, 0.705202541, -1.29431173, -1.06041716, 0.47130797, 1.23520173],
    );
}

/// The vectors of the first comparison with verl, which gave four to five digits: values 0, 0.05, .. before each token, reward 1
/// on the last, gamma 0.99, lambda 0.95.
#[test]
fn returns_of_a_ramp() {
    let algorithm = algorithm("type = 'ppo'\ngamma = 0.99\nlam = 0.95");
    let row = Sequence { value: vec![0.0, 0.05, 0.1, 0.15, 0.2], ..Sequence::plain(0, 1.0, "11111") };
    let outcome = score(&*algorithm, &algorithm.initial_state(), &[batch(&[row])]).unwrap();
    for (found, expected) in column(&outcome, Column::Return)[0].iter().zip([0.80435, 0.8526, 0.9013, 0.9504, 1.0]) {
        assert!((found - expected).abs() < 5e-5, "{found} != {expected}");
    }
}

fn correction(level: &str, lower: f64, upper: f64, normalise: bool) -> String {
    format!(
        "type = 'grpo'
         [rollout_correction]
         rollout_is = '{level}'
         rollout_is_threshold = {upper:?}
         rollout_is_threshold_lower = {lower:?}
         rollout_is_batch_normalize = {normalise}"
    )
}

#[test]
fn importance_weights() {
    let check = |level, lower, upper, normalise, expected| {
        check(&correction(level, lower, upper, normalise), Column::ImportanceWeight, expected)
    };
    check(
        "token",
        0.0,
        1.05,
        false,
        &[
            &[1.05, 1.0, 0.882496903, 1.05, 0.939413063, 0.0, 0.0],
            &[1.05, 0.939413063, 0.0, 1.0, 0.882496903, 0.0, 0.0],
            &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.939413063, 1.05, 1.0, 0.0, 1.05, 0.939413063, 1.05],
            &[0.882496903, 1.05, 0.939413063, 1.05, 1.0, 0.882496903, 1.05],
            &[1.05, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.05, 0.939413063, 1.05, 1.0, 0.882496903, 1.05, 0.0],
            &[1.0, 0.0, 1.05, 0.939413063, 0.0, 1.0, 0.0],
        ],
    );
    check(
        "token",
        0.0,
        1.05,
        true,
        &[
            &[1.05943271, 1.00898353, 0.89042484, 1.05943271, 0.947852308, 0.0, 0.0],
            &[1.05943271, 0.947852308, 0.0, 1.00898353, 0.89042484, 0.0, 0.0],
            &[1.00898353, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.947852308, 1.05943271, 1.00898353, 0.0, 1.05943271, 0.947852308, 1.05943271],
            &[0.89042484, 1.05943271, 0.947852308, 1.05943271, 1.00898353, 0.89042484, 1.05943271],
            &[1.05943271, 1.00898353, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.05943271, 0.947852308, 1.05943271, 1.00898353, 0.89042484, 1.05943271, 0.0],
            &[1.00898353, 0.0, 1.05943271, 0.947852308, 0.0, 1.00898353, 0.0],
        ],
    );
    check(
        "sequence",
        0.0,
        1.05,
        false,
        &[
            &[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
            &[0.882496903, 0.882496903, 0.0, 0.882496903, 0.882496903, 0.0, 0.0],
            &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.05, 1.05, 1.05, 0.0, 1.05, 1.05, 1.05],
            &[0.939413063, 0.939413063, 0.939413063, 0.939413063, 0.939413063, 0.939413063, 0.939413063],
            &[1.05, 1.05, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.05, 1.05, 1.05, 1.05, 1.05, 1.05, 0.0],
            &[1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0],
        ],
    );
    check(
        "sequence",
        0.0,
        1.05,
        true,
        &[
            &[1.00352363, 1.00352363, 1.00352363, 1.00352363, 1.00352363, 0.0, 0.0],
            &[0.885606495, 0.885606495, 0.0, 0.885606495, 0.885606495, 0.0, 0.0],
            &[1.00352363, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.05369981, 1.05369981, 1.05369981, 0.0, 1.05369981, 1.05369981, 1.05369981],
            &[0.942723207, 0.942723207, 0.942723207, 0.942723207, 0.942723207, 0.942723207, 0.942723207],
            &[1.05369981, 1.05369981, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.05369981, 1.05369981, 1.05369981, 1.05369981, 1.05369981, 1.05369981, 0.0],
            &[1.00352363, 0.0, 1.00352363, 1.00352363, 0.0, 1.00352363, 0.0],
        ],
    );
    check(
        "token",
        0.95,
        1.05,
        false,
        &[
            &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
            &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
            &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
            &[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        ],
    );
    check(
        "token",
        0.95,
        1.05,
        true,
        &[
            &[0.0, 3.88888889, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 3.88888889, 0.0, 0.0, 0.0],
            &[3.88888889, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 3.88888889, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 0.0, 3.88888889, 0.0, 0.0],
            &[0.0, 3.88888889, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 3.88888889, 0.0, 0.0, 0.0],
            &[3.88888889, 0.0, 0.0, 0.0, 0.0, 3.88888889, 0.0],
        ],
    );
    check(
        "sequence",
        0.9,
        1.1,
        false,
        &[
            &[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.939413063, 0.939413063, 0.939413063, 0.939413063, 0.939413063, 0.939413063, 0.939413063],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.06449446, 1.06449446, 1.06449446, 1.06449446, 1.06449446, 1.06449446, 0.0],
            &[1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0],
        ],
    );
    check(
        "sequence",
        0.9,
        1.1,
        true,
        &[
            &[1.59875058, 1.59875058, 1.59875058, 1.59875058, 1.59875058, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.59875058, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.50188717, 1.50188717, 1.50188717, 1.50188717, 1.50188717, 1.50188717, 1.50188717],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[1.70186113, 1.70186113, 1.70186113, 1.70186113, 1.70186113, 1.70186113, 0.0],
            &[1.59875058, 0.0, 1.59875058, 1.59875058, 0.0, 1.59875058, 0.0],
        ],
    );
}

fn check_metrics(toml: &str, expected: &[(&str, f64)]) {
    let algorithm = algorithm(toml);
    let outcome = score(&*algorithm, &algorithm.initial_state(), &[batch(&rows())]).unwrap();
    for (name, expected) in expected {
        let found = outcome.metrics.get(*name).unwrap_or_else(|| panic!("no {name} in {:?}", outcome.metrics));
        assert!((found - expected).abs() < TOLERANCE, "{name}: {found} != {expected}");
    }
}

#[test]
fn metrics_of_the_distance_between_engine_and_trainer() {
    check_metrics(
        "type = 'grpo'",
        &[
            ("rollout_corr/training_ppl", 2.24220409),
            ("rollout_corr/rollout_ppl", 2.25889238),
            ("rollout_corr/kl", -0.00535714286),
            ("rollout_corr/k3_kl", 0.00330635264),
            ("rollout_corr/log_ppl_diff", -0.00799851187),
            ("rollout_corr/ppl_ratio", 0.992374457),
            ("rollout_corr/chi2_token", 0.0240234957),
            ("rollout_corr/chi2_seq", 0.0666828713),
        ],
    );
    check_metrics(
        &correction("token", 0.0, 1.05, false),
        &[
            ("rollout_corr/rollout_is_mean", 0.991096456),
            ("rollout_corr/rollout_is_max", 1.05),
            ("rollout_corr/rollout_is_min", 0.882496903),
            ("rollout_corr/rollout_is_std", 0.0602271366),
            ("rollout_corr/rollout_is_eff_sample_size", 0.996320834),
            ("rollout_corr/rollout_is_ratio_fraction_high", 0.4),
            ("rollout_corr/rollout_is_ratio_fraction_low", 0.342857143),
        ],
    );
    check_metrics(
        &correction("sequence", 0.0, 1.05, false),
        &[
            ("rollout_corr/rollout_is_mean", 0.994453687),
            ("rollout_corr/rollout_is_max", 1.20623025),
            ("rollout_corr/rollout_is_min", 0.882496903),
            ("rollout_corr/rollout_is_std", 0.057282933),
            ("rollout_corr/rollout_is_eff_sample_size", 0.996692955),
            ("rollout_corr/rollout_is_ratio_fraction_high", 0.375),
            ("rollout_corr/rollout_is_ratio_fraction_low", 0.25),
        ],
    );
    check_metrics(
        &correction("token", 0.95, 1.05, false),
        &[
            ("rollout_corr/rollout_is_mean", 0.257142857),
            ("rollout_corr/rollout_is_max", 1.0),
            ("rollout_corr/rollout_is_min", 0.0),
            ("rollout_corr/rollout_is_std", 0.437058815),
            ("rollout_corr/rollout_is_eff_sample_size", 0.257142877),
            ("rollout_corr/rollout_is_ratio_fraction_high", 0.4),
            ("rollout_corr/rollout_is_ratio_fraction_low", 0.342857143),
            ("rollout_corr/rollout_is_oob_ratio", 0.742857143),
        ],
    );
    check_metrics(
        &correction("sequence", 0.9, 1.1, false),
        &[
            ("rollout_corr/rollout_is_mean", 0.656081662),
            ("rollout_corr/rollout_is_max", 1.20623025),
            ("rollout_corr/rollout_is_min", 0.882496903),
            ("rollout_corr/rollout_is_std", 0.475420381),
            ("rollout_corr/rollout_is_eff_sample_size", 0.655695885),
            ("rollout_corr/rollout_is_ratio_fraction_high", 0.25),
            ("rollout_corr/rollout_is_ratio_fraction_low", 0.125),
            ("rollout_corr/rollout_is_oob_ratio", 0.342857143),
        ],
    );
}
