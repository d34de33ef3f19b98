//! Golden cases of the built-in parts, as a job file asks for them.

use super::*;
use crate::reward::testing::sample;
use expect_test::{Expect, expect};
use serde_json::json;

fn builtin(toml: &str) -> Builtin {
    let part: RewardFunction = toml::from_str(toml).unwrap();
    Builtin::new(&part).unwrap().unwrap()
}

/// Each case is (completion, ground truth, value, whether there was an answer).
fn check(toml: &str, cases: &[(&str, Value, f64, bool)]) {
    let part = builtin(toml);
    for (completion, truth, value, answered) in cases {
        let expected = Judged { value: *value, answered: *answered };
        assert_eq!(part.judge(&sample(completion, truth.clone())), Ok(expected), "{toml}: {completion:?}");
    }
}

#[test]
fn exact_compares_text() {
    check(
        "type = 'exact'",
        &[
            (" Paris\n", json!("Paris"), 1.0, true),
            ("New  York", json!("New York"), 1.0, true),
            ("paris", json!("Paris"), 0.0, true),
            ("Lyon", json!(["Paris", "Lyon"]), 1.0, true),
            ("42", json!(42), 1.0, true),
            ("true", json!(true), 1.0, true),
        ],
    );
    check(
        "type = 'exact'\nignore_case = true\nnormalize_whitespace = false\nextract = 'answer: (\\w+)'",
        &[("answer: LYON, no, answer: Paris!", json!("PARIS"), 1.0, true), ("Paris", json!("Paris"), 0.0, false)],
    );
}

#[test]
fn numeric_finds_the_number_after_the_marker() {
    check(
        "type = 'numeric'\nformat_score = 0.1",
        &[
            ("so 6 * 7 = 42\n#### 42", json!("42"), 1.0, true),
            ("#### 41\nno:\n#### 42", json!("42"), 1.0, true),
            ("#### $1,234.00", json!("1234"), 1.0, true),
            ("#### **42** apples", json!(42), 1.0, true),
            ("#### 42.", json!("42"), 1.0, true),
            ("####42", json!("42"), 1.0, true),
            ("#### 0.5", json!("1/2"), 1.0, true),
            ("#### 50%", json!("50"), 1.0, true),
            ("#### 41", json!("42"), 0.1, true),
            ("the answer is 42", json!("42"), 0.0, false),
            ("#### about 42", json!("42"), 0.0, false),
            ("#### 42\n#### none", json!("42"), 1.0, true),
            // A long way after the answer.
            (&format!("#### 42{}", " thanks".repeat(100)), json!("42"), 1.0, true),
            // The ground truth as GSM8K writes it.
            ("#### 18", json!("16 - 3 - 4 = 9 ducks\n9 * 2 = 18\n#### 18"), 1.0, true),
        ],
    );
}

#[test]
fn numeric_takes_the_last_number_where_told() {
    check(
        "type = 'numeric'\nmethod = 'flexible'\ntolerance = 0.01",
        &[
            ("16 - 3 - 4 = 9, and 9 * 2 = 18 dollars.", json!("18"), 1.0, true),
            ("It is 3.14", json!("3.14159"), 1.0, true),
            ("It is 3.2", json!("3.14159"), 0.0, true),
            ("no idea", json!("18"), 0.0, false),
        ],
    );
}

#[test]
fn boxed_compares_mathematics() {
    check(
        "type = 'boxed'\nformat_score = -0.5",
        &[
            (r"Thus $\boxed{\dfrac{1}{2}}$.", json!("0.5"), 1.0, true),
            (r"\boxed{1} or rather \boxed{2}", json!("2"), 1.0, true),
            (r"\boxed{3}", json!(r"so \boxed{3}"), 1.0, true),
            (r"\boxed{3}", json!(["2", "3"]), 1.0, true),
            (r"\boxed{4}", json!("3"), -0.5, true),
            ("3", json!("3"), 0.0, false),
        ],
    );
}

#[test]
fn patterns_match_or_compare() {
    check(
        r"type = 'regex'
          pattern = '^\s*yes'",
        &[(" yes, sir", Value::Null, 1.0, true), ("no", Value::Null, 0.0, false)],
    );
    check(
        r"type = 'regex'
          pattern = 'Answer: (?P<answer>[A-D])'",
        &[
            ("Answer: A, no, Answer: B", json!("B"), 1.0, true),
            ("Answer: C", json!("B"), 0.0, true),
            ("B", json!("B"), 0.0, false),
        ],
    );
}

#[test]
fn shape_and_length() {
    check(
        "type = 'format'",
        &[("<think>a</think><answer>b</answer>", Value::Null, 1.0, true), ("b", Value::Null, 0.0, true)],
    );
    let part = builtin("type = 'overlong'\nmax_tokens = 100\nbuffer_tokens = 20");
    let of = |tokens| part.judge(&Sample { completion_tokens: tokens, ..sample("x", Value::Null) }).unwrap().value;
    assert_eq!([of(80), of(90), of(100), of(1000)], [0.0, -0.5, -1.0, -1.0]);
    let part = builtin("type = 'length'\ntarget_tokens = 100\ntolerance_tokens = 50");
    let of = |tokens| part.judge(&Sample { completion_tokens: tokens, ..sample("x", Value::Null) }).unwrap().value;
    assert_eq!([of(100), of(75), of(0)], [1.0, 0.5, 0.0]);
    check(
        "type = 'countdown'\nformat_score = 0.1",
        &[
            ("<answer>(1 + 2) * 3</answer>", json!({"target": 9, "numbers": [3, 2, 1]}), 1.0, true),
            ("<answer>1 + 2 + 3</answer>", json!({"target": 9, "numbers": [3, 2, 1]}), 0.1, true),
            ("<answer>3 * 3</answer>", json!({"target": 9, "numbers": [3, 2, 1]}), 0.0, false),
        ],
    );
}

fn check_error(toml: &str, truth: Value, expected: Expect) {
    expected.assert_eq(&builtin(toml).judge(&sample("#### 1", truth)).unwrap_err());
}

#[test]
fn ground_truths_of_another_kind_are_errors() {
    check_error(
        "type = 'numeric'",
        json!("Paris"),
        expect![[r#"the ground truth "Paris" is no number; `numeric` compares numbers, `exact` and `boxed` others"#]],
    );
    check_error(
        "type = 'numeric'",
        Value::Null,
        expect!["there is no ground truth to compare with; set `prompts.answer_key`"],
    );
    check_error(
        "type = 'exact'",
        json!({"a": 1}),
        expect![[r#"the ground truth is {"a":1}; expected a text, a number, or a list of these"#]],
    );
    check_error(
        "type = 'countdown'",
        json!("24"),
        expect![[r#"the ground truth is "24"; expected {"target": 24, "numbers": [4, 6]}"#]],
    );
    let look_ahead: RewardFunction = toml::from_str("type = 'regex'\npattern = '(?=a)'").unwrap();
    let error = Builtin::new(&look_ahead).unwrap_err();
    assert!(error.starts_with("`pattern` is no regular expression of Rust's regex crate"), "{error}");
}
