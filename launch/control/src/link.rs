//! An edge of the tree: from the driver to an agent, from an agent to a rank.
//!
//! The parent holds a [`Link`]: a bounded queue of frames per lane. What comes up goes, with the child's number, into
//! one bounded channel of the parent, also the word that the child is lost. A child is a [`Node`]; over the network its
//! lanes are gRPC streams, within a process the same queues without the network between.

use crate::error::{Cause, RankFailure};
use crate::flight::endpoint;
use crate::secret::Bearer;
use crate::tasks::Tasks;
use crate::wire::generated::calls::{calls_client::CallsClient, calls_server};
use crate::wire::{Down, LANE_HEADER, Lane, MAX_FRAME_BYTES, Up};
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Frames that wait on an edge, each way.
pub(crate) const LINK_QUEUE: usize = 16;

/// Frames as they come down a lane; ends with the connection.
pub(crate) type Frames = BoxStream<'static, Down>;

/// What comes up from a child.
#[derive(Debug)]
pub(crate) enum Event {
    Up(Up),
    Lost(String),
}

/// Where a node's answers go.
#[derive(Clone, Debug)]
pub(crate) enum UpSender {
    Wire(mpsc::Sender<Result<Up, Status>>),
    Local { child: u32, events: mpsc::Sender<(u32, Event)> },
}

impl UpSender {
    /// Waits for room. Nobody may be there any more: then there is nobody to tell.
    pub async fn send(&self, up: Up) {
        match self {
            UpSender::Wire(sender) => {
                let _ = sender.send(Ok(up)).await;
            }
            UpSender::Local { child, events } => {
                let _ = events.send((*child, Event::Up(up))).await;
            }
        }
    }

    /// As [`UpSender::send`], on a thread that may block.
    pub fn blocking_send(&self, up: Up) {
        match self {
            UpSender::Wire(sender) => {
                let _ = sender.blocking_send(Ok(up));
            }
            UpSender::Local { child, events } => {
                let _ = events.blocking_send((*child, Event::Up(up)));
            }
        }
    }
}

/// Calls whose cancellation overtook them: admin lanes are faster. The last few are remembered.
#[derive(Default)]
pub(crate) struct Early(VecDeque<u64>);

impl Early {
    const REMEMBERED: usize = 256;

    /// The call is not here (yet).
    pub fn put(&mut self, call: u64) {
        if self.0.len() == Early::REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(call);
    }

    /// Whether the call that comes now was cancelled before.
    pub fn take(&mut self, call: u64) -> bool {
        let at = self.0.iter().position(|&early| early == call);
        at.is_some_and(|at| self.0.remove(at).is_some())
    }
}

/// Something that serves lanes: an agent or a rank.
pub(crate) trait Node: Send + Sync + 'static {
    /// Serves a lane until its frames end.
    fn serve(self: Arc<Self>, lane: Lane, frames: Frames, up: UpSender) -> BoxFuture<'static, ()>;
}

/// A parent's end of an edge.
#[derive(Clone)]
pub(crate) struct Link {
    work: mpsc::Sender<Down>,
    admin: mpsc::Sender<Down>,
}

impl Link {
    /// The queue of a lane.
    pub fn lane(&self, lane: Lane) -> &mpsc::Sender<Down> {
        match lane {
            Lane::Work => &self.work,
            Lane::Admin => &self.admin,
        }
    }

    /// To a child in another process.
    pub async fn connect(
        address: &str,
        bearer: Bearer,
        child: u32,
        events: &mpsc::Sender<(u32, Event)>,
        tasks: &Tasks,
    ) -> Result<Link, RankFailure> {
        let lost = |e: &dyn std::error::Error| RankFailure::new(Cause::Lost, format!("{address}: {}", sources(e)));
        let channel = endpoint(address)?.connect().await.map_err(|e| lost(&e))?;
        let client = CallsClient::with_interceptor(channel, bearer);
        let mut client = client.max_decoding_message_size(MAX_FRAME_BYTES).max_encoding_message_size(MAX_FRAME_BYTES);
        let mut lanes = Vec::new();
        for lane in [Lane::Work, Lane::Admin] {
            let (sender, frames) = mpsc::channel(LINK_QUEUE);
            let mut request = Request::new(ReceiverStream::new(frames));
            request.metadata_mut().insert(LANE_HEADER, lane.name().parse().map_err(|e| lost(&e))?);
            let answers = client.lane(request).await?.into_inner();
            tasks.spawn("answers of a child", forward(answers, child, events.clone()));
            lanes.push(sender);
        }
        let [work, admin] = <[_; 2]>::try_from(lanes).map_err(|_| RankFailure::new(Cause::Protocol, "two lanes"))?;
        Ok(Link { work, admin })
    }

    /// To a child in this process.
    pub fn local(node: &Arc<dyn Node>, child: u32, events: &mpsc::Sender<(u32, Event)>, tasks: &Tasks) -> Link {
        let lane = |lane| {
            let (sender, frames) = mpsc::channel(LINK_QUEUE);
            let up = UpSender::Local { child, events: events.clone() };
            let (node, events) = (node.clone(), events.clone());
            tasks.spawn("a lane of a rank in this process", async move {
                node.serve(lane, ReceiverStream::new(frames).boxed(), up).await;
                let _ = events.send((child, Event::Lost("it ended".into()))).await;
                Ok(())
            });
            sender
        };
        Link { work: lane(Lane::Work), admin: lane(Lane::Admin) }
    }
}

async fn forward(mut answers: Streaming<Up>, child: u32, events: mpsc::Sender<(u32, Event)>) -> Result<(), String> {
    loop {
        let event = match answers.next().await {
            Some(Ok(up)) => Event::Up(up),
            Some(Err(status)) => Event::Lost(format!("the connection to it broke ({})", status.message())),
            None => Event::Lost("it closed the connection".into()),
        };
        let lost = matches!(event, Event::Lost(_));
        // The parent is gone when nobody receives.
        if events.send((child, event)).await.is_err() || lost {
            return Ok(());
        }
    }
}

/// An error with its causes, which tonic hides one below the other.
pub(crate) fn sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// A child's end of the edges to its parents.
pub(crate) struct CallsService<N> {
    node: Arc<N>,
    tasks: Arc<Tasks>,
}

impl<N: Node> CallsService<N> {
    pub fn new(node: Arc<N>, tasks: Arc<Tasks>) -> CallsService<N> {
        CallsService { node, tasks }
    }
}

#[tonic::async_trait]
impl<N: Node> calls_server::Calls for CallsService<N> {
    type LaneStream = ReceiverStream<Result<Up, Status>>;

    async fn lane(&self, request: Request<Streaming<Down>>) -> Result<Response<Self::LaneStream>, Status> {
        let name = request.metadata().get(LANE_HEADER).and_then(|name| name.to_str().ok()).unwrap_or("");
        let lane = Lane::named(name)
            .ok_or_else(|| RankFailure::new(Cause::Protocol, format!("there is no lane `{name}`")).status())?;
        let frames = request.into_inner().take_while(|frame| std::future::ready(frame.is_ok()));
        let frames = frames.filter_map(|frame| std::future::ready(frame.ok())).boxed();
        let (up, answers) = mpsc::channel(LINK_QUEUE);
        let node = self.node.clone();
        self.tasks.spawn("a lane", async move {
            node.serve(lane, frames, UpSender::Wire(up)).await;
            Ok(())
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
