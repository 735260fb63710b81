//! Whole controllers and workers over real nats-servers that go away.

use std::net::TcpListener;
use std::time::Duration;

use mlx_serving_router::config::{ClusterConfig, NatsMode, ServerUrls};
use mlx_serving_router::dispatch::{CallOptions, Controller, TokenStream};
use mlx_serving_router::error::ControllerErrorCode as Code;
use mlx_serving_router::transport::nats::NatsConnection;
use mlx_serving_router::wire::Phase;
use mlx_serving_router::worker::Worker;

use super::server::Server;
use super::{PATIENCE, finish, options, request};

fn config(servers: Vec<String>) -> ClusterConfig {
    let mut config = ClusterConfig::default();
    config.nats.mode = NatsMode::External;
    config.nats.server_url = ServerUrls::Many(servers);
    config
}

/// A worker that says a token every two milliseconds, two seconds long.
async fn talker(server: &Server) -> Worker {
    let worker = Worker::new(options("w", 32, 64), &config(vec![server.url()])).unwrap();
    worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
    worker.start(None).await.unwrap();
    let jobs = worker.jobs();
    tokio::spawn(async move {
        while let Some(job) = jobs.next().await {
            tokio::spawn(async move {
                for number in 0..1_000 {
                    job.token("x", &[number], None);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                job.done(finish(), None);
            });
        }
    });
    worker
}

async fn end(mut stream: TokenStream) -> Option<Code> {
    loop {
        match stream.next_batch().await {
            Ok(batch) if batch.is_empty() => return None,
            Ok(_) => {}
            Err(error) => return Some(error.code()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_break_with_our_own_connection_blame_no_worker() {
    let Some((staying, leaving)) = Server::start_two().await else { return };
    // The second name makes it wait for another server, which it knows by what the first one tells.
    let controller = Controller::new(config(vec![leaving.url(), "nats://127.0.0.1:1".into()]), None).unwrap();
    controller.start(None).await.unwrap();
    let worker = talker(&staying).await;
    tokio::time::timeout(PATIENCE, controller.wait_for_workers(1)).await.expect("it is seen").unwrap();
    let mut streams = Vec::new();
    for number in 0..8 {
        let request = request(&format!("r{number}"), true);
        streams.push(controller.streaming(request, CallOptions::default()).await.unwrap());
    }
    let reading: Vec<_> = streams.into_iter().map(|stream| tokio::spawn(end(stream))).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(leaving);
    for reading in reading {
        assert_eq!(reading.await.unwrap(), Some(Code::StreamInterrupted));
    }
    let breaker = &controller.breaker_stats()[0].1;
    assert_eq!((breaker.failure_count, breaker.window_failures, breaker.state.as_str()), (0, 0, "CLOSED"));
    controller.stop(Duration::ZERO).await;
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn a_server_that_does_not_answer_leaves_time_for_the_others() {
    let Some(server) = Server::start().await else { return };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut nats = config(vec![format!("nats://{}", silent.local_addr().unwrap()), server.url()]).nats;
    nats.connect_timeout_ms = 1_000;
    // Either may be tried first.
    for _ in 0..8 {
        NatsConnection::connect(&nats, "test").await.unwrap();
    }
}
