//! Random inputs, comparison in float64, and gradients of both sides.

use std::time::{SystemTime, UNIX_EPOCH};

use tch::{Device, Kind, Tensor};

/// Types the kernels take, each with the norm-relative error one rounded operation may have.
pub const KINDS: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::BFloat16, 6e-3)];

/// Seeds libtorch's generator differently from run to run, and prints with what: `TANGELO_TEST_SEED=...` repeats it.
pub fn seed_freshly() {
    let given = std::env::var("TANGELO_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    let seed = given.unwrap_or(i64::from(now) % 1_000_000);
    println!("seed {seed} (repeat with TANGELO_TEST_SEED={seed})");
    tch::manual_seed(seed);
}

/// A random number from 0 to below `limit`.
pub fn below(limit: i64) -> i64 {
    Tensor::randint(limit, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0])
}

/// Fresh normal numbers, exactly representable in `kind`.
pub fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// The same numbers in float64, as a leaf.
pub fn double_leaf(x: &Tensor) -> Tensor {
    x.detach().to_kind(Kind::Double).set_requires_grad(true)
}

/// The same tensor as a leaf.
pub fn leaf(x: &Tensor) -> Tensor {
    x.detach().copy().set_requires_grad(true)
}

/// ||got - expected|| / ||expected||, in float64.
pub fn error(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.size(), expected.size(), "shapes differ");
    let expected = expected.detach().to_kind(Kind::Double);
    let difference = (got.detach().to_kind(Kind::Double) - &expected).norm().double_value(&[]);
    difference / expected.norm().double_value(&[]).max(1e-30)
}

#[track_caller]
pub fn assert_close(name: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let found = error(got, expected);
    assert!(found <= tolerance, "{name}: relative error {found:.2e}, allowed {tolerance:.0e}");
}

/// Asserts the very same bits.
#[track_caller]
pub fn assert_same_bits(name: &str, a: &Tensor, b: &Tensor) {
    assert!(a.equal(b), "{name}: bits differ, relative error {:.2e}", error(a, b));
}

/// Runs `work` with 1 and with 2 threads. Thread counts are the process's: nextest runs each test in its own.
pub fn with_one_and_two_threads<R>(mut work: impl FnMut() -> R) -> (R, R) {
    let before = tch::get_num_threads();
    tch::set_num_threads(1);
    let one = work();
    tch::set_num_threads(2);
    let two = work();
    tch::set_num_threads(before);
    (one, two)
}

/// The message of the panic with which an operator refuses its arguments.
pub fn refusal<R>(call: impl FnOnce() -> R) -> String {
    let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) else {
        panic!("the call must be refused");
    };
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}
