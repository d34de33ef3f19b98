//! The loop of an RL job with toy models: every verb, every transfer protocol, pools that overlap.

use crate::support::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tangelo_configs::SamplingParams;
use tangelo_control::verbs::mesh;
use tangelo_control::*;
use tangelo_core::{Axis, Batch, Column, DeviceMesh, LossSpec};

/// Reads nothing but the tokens.
fn loss() -> LossSpec {
    LossSpec::new(Vec::new())
}

/// The thin path, which is the recipe: prompts from the driver, completions from rollout ranks, columns from the
/// reference, a step of the policy, weights back; on two nodes, with everything in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_of_the_recipe() {
    let placement = Placement::grouped(&[(&["policy", "reference"], 4), (&["rollout"], 2)]);
    let job = TestJob::start(placement, 2, data_parallel, |_| toy()).await;
    let [policy, reference, rollout] = ["policy", "reference", "rollout"].map(|r| job.cluster.group(r).unwrap());
    job.cluster.begin_step(1);

    let given = prompts(7);
    let handle = job.cluster.put(&given).unwrap();
    let params = SamplingParams { n: 3, ..SamplingParams::default() };
    let sampling = Sampling { params, seed: 0 };
    let completed = rollout.generate(&handle, &sampling).await.unwrap().batch.unwrap();
    let groups: Vec<i64> = completed.rows().iter().map(|row| row.group).collect();
    assert_eq!(groups, (0..7).flat_map(|i| [10 + i; 3]).collect::<Vec<i64>>());

    let annotated = reference.forward(&completed, &[Column::RefLogprob]).await.unwrap();
    assert_eq!(annotated.columns(), [Column::Tokens, Column::GroupId, Column::RefLogprob]);
    let whole = Batch::new(job.cluster.fetch(&annotated, &annotated.columns()).await.unwrap()).unwrap();
    let factor = Column::RefLogprob as u32 as f32;
    let expected: Vec<f32> = whole.u32_values(Column::Tokens).unwrap().iter().map(|&t| t as f32 * factor).collect();
    assert_eq!(whole.f32_values(Column::RefLogprob).unwrap(), expected);
    for (row, tokens) in rows(&whole, Column::Tokens).iter().enumerate() {
        let (prompt, i) = (row / 3, row as u32 % 3 + 1);
        assert_eq!(tokens[..prompt % 5 + 1], vec![prompt as u32; prompt % 5 + 1]);
        assert!(tokens[prompt % 5 + 1..].iter().all(|t| t / 1000 == i), "row {row}: {tokens:?}");
    }

    let metrics = policy.forward_backward(&annotated, &loss()).await.unwrap();
    let sum: u32 = whole.u32_values(Column::Tokens).unwrap().iter().sum();
    assert_eq!(metrics.get("loss"), Some(f64::from(sum) / whole.num_tokens() as f64));
    assert_eq!(metrics.get("sequences"), Some(21.0));
    policy.optim_step(1e-6).await.unwrap();
    let (published, _) = policy.publish(40).await.unwrap();
    assert_eq!(published.details, [40, 41, 42, 43].map(serde_json::Value::from));
    rollout.pull(&published).await.unwrap();
    policy.save(Path::new("/nowhere")).await.unwrap();

    let ended = job.cluster.end_step().await.unwrap();
    assert!(ended.get("control/driver_data_bytes").unwrap() > 0.0);
    assert!(job.end().await.iter().all(Result::is_ok));
}

/// What each rank was given, and who was heard, for a mesh of pp 2, dp 2, tp 2 with one batch of 4 rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_protocol_gives_the_right_part_to_the_right_ranks() {
    let mesh = DeviceMesh::new(&[(Axis::Pp, 2), (Axis::DpShard, 2), (Axis::Tp, 2)]).unwrap();
    let seats = move |_: &Placement, rank: usize| {
        let meshes = BTreeMap::from([(mesh::TRAIN.to_owned(), Seat::training(&mesh, rank))]);
        Seats::from([("policy".to_owned(), meshes)])
    };
    // Every rank says which rows it was given.
    let echo = |_: usize| {
        worker(|job: &Job, _: &Control| {
            let detail = match &job.request {
                Request::Score { .. } => serde_json::json!(job.batch()?.i64_values(Column::GroupId).unwrap()),
                Request::OptimStep { lr } => serde_json::json!(lr),
                _ => serde_json::Value::Null,
            };
            Ok(Output { detail, ..Output::default() })
        })
    };
    let job = TestJob::start(Placement::colocated(&["policy"], 8), 2, seats, echo).await;
    let policy = job.policy();
    let mesh = DeviceMesh::new(&[(Axis::Pp, 2), (Axis::DpShard, 2), (Axis::Tp, 2)]).unwrap();
    let ranks: Vec<usize> = (0..8).collect();
    let (dp, tp) = (mesh.whole(Axis::DpShard), mesh.whole(Axis::Tp));
    let lr = |lr| Request::OptimStep { lr };

    let check = async |map: &MeshMap, args: Args<Request>, expected: &[(usize, serde_json::Value)]| {
        let answers = policy.call(map, args).await.unwrap();
        let found: Vec<_> = answers.into_iter().map(|(rank, answer)| (rank, answer.detail)).collect();
        assert_eq!(found, expected);
    };
    // One to all: all get the same, all answer.
    let all = ranks.iter().map(|&rank| (rank, 0.5.into())).collect::<Vec<_>>();
    check(&MeshMap::everyone(&ranks).unwrap(), Args::Same(lr(0.5)), &all).await;
    // Pipeline stages: all get the same, the first of each stage answers.
    let stages = MeshMap::over(&mesh, &ranks, &[], &[(dp, 0), (tp, 0)]).unwrap();
    check(&stages, Args::Same(lr(0.5)), &[(0, 0.5.into()), (4, 0.5.into())]).await;
    // All to all: each rank its own.
    let plain = DeviceMesh::new(&[(Axis::DpShard, 8)]).unwrap();
    let own = MeshMap::over(&plain, &ranks, &[plain.whole(Axis::DpShard)], &[]).unwrap();
    let each: Vec<(usize, serde_json::Value)> = ranks.iter().map(|&rank| (rank, (rank as f64).into())).collect();
    check(&own, Args::PerIndex(ranks.iter().map(|&rank| lr(rank as f64)).collect()), &each).await;
    // Split over dp, broadcast within: the last stage's first tensor rank answers for each part.
    let batch = job.cluster.put(&prompts(4)).unwrap();
    let scored = policy.score(&batch, &[Column::GroupId, Column::Tokens], &serde_json::Value::Null).await.unwrap();
    let mut seen: Vec<i64> =
        scored.details.iter().flat_map(|d| serde_json::from_value::<Vec<i64>>(d.clone()).unwrap()).collect();
    assert_eq!(scored.details.len(), 2, "one answer per data-parallel part");
    seen.sort_unstable();
    assert_eq!(seen, [10, 11, 12, 13]);
    // Generation on micro-dp groups is a mesh that these ranks did not register.
    let error = policy.generate(&batch, &Sampling::default()).await.unwrap_err();
    expect_test::expect!["the ranks of role `policy` registered no mesh `generate`, only train"]
        .assert_eq(&error.to_string());
    let error = policy.call(&own, Args::PerIndex(vec![lr(1.0); 3])).await.unwrap_err();
    expect_test::expect!["3 requests for the 8 parts of role `policy`; one for each part is needed"]
        .assert_eq(&error.to_string());
    assert!(job.end().await.iter().all(Result::is_ok));
}

/// Two pools work at once; two roles of one pool take turns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_overlap_where_pools_differ() {
    const NAP: Duration = Duration::from_millis(200);
    let slow = |_: usize| {
        worker(|_: &Job, _: &Control| {
            std::thread::sleep(NAP);
            Ok(Output::default())
        })
    };
    let placement = Placement::grouped(&[(&["policy", "critic"], 1), (&["reference"], 1)]);
    let job = TestJob::start(placement, 1, data_parallel, slow).await;
    let [policy, critic, reference] = ["policy", "critic", "reference"].map(|r| job.cluster.group(r).unwrap());
    let begin = Instant::now();
    tokio::try_join!(policy.optim_step(0.1), reference.optim_step(0.1)).unwrap();
    let apart = begin.elapsed();
    let begin = Instant::now();
    tokio::try_join!(policy.optim_step(0.1), critic.optim_step(0.1)).unwrap();
    let together = begin.elapsed();
    assert!(together >= 2 * NAP, "two roles of one rank at once: {together:?}");
    assert!(apart < together, "pools did not overlap: {apart:?} and {together:?}");
    assert!(job.end().await.iter().all(Result::is_ok));
}
