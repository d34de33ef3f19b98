//! Strangers are refused everywhere; processes that do not belong or do not come are named.

use crate::support::*;
use arrow_flight::Ticket;
use arrow_flight::flight_service_client::FlightServiceClient;
use std::time::Duration;
use tangelo_control::*;
use tonic::Code;
use tonic::transport::Endpoint;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_is_refused_and_counted() {
    let job = TestJob::of(1, |_| toy()).await;
    let handle = job.cluster.put(&prompts(2)).unwrap();
    let made = job.policy().forward(&handle, &[tangelo_core::Column::Value]).await.unwrap();
    let holders: Vec<String> = made.shards().into_iter().map(|shard| shard.address).collect();
    assert_eq!(holders.len(), 2, "the driver and the rank");
    for address in &holders {
        let channel = Endpoint::try_from(format!("http://{address}")).unwrap().connect().await.unwrap();
        let mut stranger = FlightServiceClient::new(channel);
        let ticket = || Ticket { ticket: bytes::Bytes::from_static(b"{}") };
        let status = stranger.do_get(ticket()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        let mut guess = tonic::Request::new(ticket());
        guess.metadata_mut().insert("x-tangelo-secret", "0".repeat(64).parse().unwrap());
        let status = stranger.do_get(guess).await.unwrap_err();
        assert!(status.message().contains("refused a call with a wrong secret"), "{status}");
    }
    assert_eq!(job.cluster.strangers_refused(), 2);
    assert_eq!(job.cluster.statistics().await.unwrap()[0]["strangers_refused"], 2.0);
    assert!(job.end().await.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_belong_cannot_register() {
    let driver = Driver::listen(options(1, 2)).await.unwrap();
    let rank = |rank| RankOptions { rank, seats: Seats::new(), store_limit_bytes: 0 };
    let check = async |member: Membership, number: usize, expected: &str| {
        let error = Rank::start(&member, rank(number)).await.map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("registering with the driver at 127.0.0.1:") && error.contains(expected), "{error}");
    };
    let stranger = Membership { secret: Secret::generate().unwrap(), ..driver.member(0) };
    check(stranger, 0, "the driver refused a call with a wrong secret; give every process of the job the same").await;
    let other_job = Membership { job: "other".into(), ..driver.member(0) };
    check(other_job, 0, "this is the driver of job `test`, not of `other`").await;
    check(driver.member(0), 2, "rank 2 does not exist: the job has 2 ranks").await;
    check(driver.member(1), 0, "node 1 does not exist: the job has 1 nodes").await;
    let _rank = Rank::start(&driver.member(0), rank(1)).await.unwrap();
    check(driver.member(0), 1, "rank 1 is there already: node 0, 127.0.0.1:").await;

    let placement = Placement::colocated(&["policy"], 2);
    let error = driver.assemble(placement, Duration::from_millis(50)).await.map(|_| ()).unwrap_err();
    expect_test::expect![
        "waited 50ms for the processes of the job; 1 of 2 ranks missing: 0; 1 of 1 node agents missing: 0. See their logs; they need TANGELO_DRIVER_ADDRESS and TANGELO_JOB_SECRET_FILE"
    ]
    .assert_eq(&error.to_string());
}

/// A rank has one driver: frames on a second work lane are answered with a refusal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_that_do_not_fit_are_refused_before_anybody_is_waited_for() {
    let driver = Driver::listen(options(1, 2)).await.unwrap();
    let mut placement = Placement::colocated(&["policy"], 2);
    placement.roles.get_mut("policy").unwrap().ranks = 4;
    let error = driver.assemble(placement, PATIENCE).await.map(|_| ()).unwrap_err();
    expect_test::expect![
        "role `policy` needs 4 ranks (the product of its degrees), but its pool `policy` has 2; change the role's degrees or the pool's size"
    ]
    .assert_eq(&error.to_string());
    assert_eq!(error.kind().exit_code(), 2);
}
