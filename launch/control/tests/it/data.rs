//! Batches worker to worker: sizes beyond gRPC's limit, handles that were dropped, bytes through the driver.

use crate::support::*;
use tangelo_control::*;
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column, LossSpec};

/// 24 MiB of tokens and as much of log-probabilities go from the rollout ranks to the policy's; of them one row has
/// more than gRPC's 4 MiB. The driver sees only metadata.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_batches_go_past_the_driver() {
    const ROW: usize = 1 << 20;
    let make = |rank: usize| match rank {
        0 | 1 => worker(|job, _| {
            let rows = job.batch()?.num_sequences();
            let lengths = |row: usize| if row == 0 { 2 * ROW } else { ROW };
            let tokens: Vec<Vec<u32>> = (0..rows).map(|row| vec![row as u32 + 1; lengths(row)]).collect();
            let logprobs: Vec<Vec<f32>> = tokens.iter().map(|row| vec![-0.5; row.len()]).collect();
            let columns = vec![(Column::Tokens, ragged_u32(&tokens)), (Column::RolloutLogprob, ragged_f32(&logprobs))];
            Ok(Output::columns(NewColumns::new(columns)?))
        }),
        _ => toy(),
    };
    let placement = Placement::grouped(&[(&["rollout"], 2), (&["policy"], 2)]);
    let job = TestJob::start(placement, 2, data_parallel, make).await;
    let [rollout, policy] = ["rollout", "policy"].map(|role| job.cluster.group(role).unwrap());
    job.cluster.begin_step(1);
    let handle = job.cluster.put(&prompts(4)).unwrap();
    let batch = rollout.generate(&handle, &Sampling::default()).await.unwrap().batch.unwrap();
    assert_eq!(batch.num_tokens(), 6 * ROW as u64);
    let metrics = policy.forward_backward(&batch, &LossSpec::new(Vec::new())).await.unwrap();
    // Two parts of rows of value 1 (2 ROW tokens) and 2 (ROW tokens).
    assert_eq!(metrics.get("loss"), Some(8.0 / 6.0));
    let ended = job.cluster.end_step().await.unwrap();
    let driver = ended.get("control/driver_bytes").unwrap();
    assert!(driver < 20e3, "{driver} bytes went through the driver for a step of 24 MiB");
    let received: f64 = job.cluster.statistics().await.unwrap().iter().map(|s| s["data_received_bytes"]).sum();
    assert!(received >= 24e6, "the policy's ranks pulled {received} bytes");
    assert!(job.end().await.iter().all(Result::is_ok));
}

/// What comes back is what was put together, row by row, whatever was selected, and in which order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_selection_of_rows_arrives_in_order() {
    let job = TestJob::of(3, |_| toy()).await;
    let handle = job.cluster.put(&prompts(11)).unwrap();
    let made = job.policy().forward(&handle, &[Column::Value, Column::Return]).await.unwrap();
    let order: Vec<usize> = (0..11).map(|i| i * 7 % 11).chain([3, 3]).collect();
    let picked = made.select(&order).unwrap();
    let columns = [Column::Return, Column::Tokens, Column::GroupId];
    let fetched = Batch::new(job.cluster.fetch(&picked, &columns).await.unwrap()).unwrap();
    let groups: Vec<i64> = order.iter().map(|&row| 10 + row as i64).collect();
    assert_eq!(fetched.i64_values(Column::GroupId).unwrap(), groups);
    let tokens: Vec<Vec<u32>> = order.iter().map(|&row| vec![row as u32; row % 5 + 1]).collect();
    assert_eq!(rows(&fetched, Column::Tokens), tokens);
    let factor = Column::Return as u32 as f32;
    let expected: Vec<f32> = tokens.concat().iter().map(|&t| t as f32 * factor).collect();
    assert_eq!(fetched.f32_values(Column::Return).unwrap(), expected);
    assert!(fetched.f32_values(Column::Value).is_err(), "a column that was not asked for came");
    assert!(job.end().await.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_batches_say_so() {
    let job = TestJob::of(1, |_| toy()).await;
    let policy = job.policy();
    job.cluster.begin_step(4);
    let handle = job.cluster.put(&prompts(2)).unwrap();
    let made = policy.forward(&handle, &[Column::Value]).await.unwrap();
    let check = async |expected: &str| {
        let error = job.cluster.fetch(&made, &[Column::Value]).await.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("batch 0 of rank 0 is not here: made in step 4 by ") && text.contains(expected),
            "{text}"
        );
        assert_eq!(error.kind().exit_code(), 1);
    };
    job.cluster.fetch(&made, &[Column::Value]).await.unwrap();
    job.cluster.drop_batch(&made.narrow(&[Column::Value], &[]).unwrap()).await.unwrap();
    check("dropped by the driver during step 4; a batch lives until it is dropped or its step ends").await;
    // The prompts are still there; at the end of the step they go too, and a verb that needs them says whose they were.
    policy.forward(&handle, &[Column::Value]).await.unwrap();
    job.cluster.end_step().await.unwrap();
    job.cluster.begin_step(5);
    let error = policy.forward(&handle, &[Column::Value]).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("rank 0 (node 0) failed in policy.forward of step 5: pulling from"), "{text}");
    assert!(
        text.contains("batch 0 of the driver is not here: made in step 4 by the driver, dropped at the end of step 4"),
        "{text}"
    );
    assert_eq!(job.cluster.statistics().await.unwrap()[0]["batches_held"], 0.0);
    assert!(job.end().await.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_together_is_refused() {
    let wrong_type =
        || worker(|_, _| NewColumns::new(vec![(Column::Value, per_sequence_i64(vec![1]))]).map(Output::columns));
    let job = TestJob::of(1, |_| wrong_type()).await;
    let handle = job.cluster.put(&prompts(1)).unwrap();
    let error = job.policy().forward(&handle, &[Column::Value]).await.unwrap_err();
    assert!(error.to_string().contains("made column `value` of type Int64, expected LargeList"), "{error}");
    let error = job.policy().forward_backward(&handle, &LossSpec::next_token()).await.unwrap_err();
    expect_test::expect![
        "column `targets` is needed but this batch has only tokens, group_id; run the verb that makes it first"
    ]
    .assert_eq(&error.to_string());
    assert!(job.end().await.iter().all(Result::is_ok));
}
