//! The server of a process: one free port for calls, batches and (the driver's) registrations, all behind the secret.

use crate::error::ControlError;
use crate::flight::{HTTP_FRAME_BYTES, Shelf, WINDOW_BYTES};
use crate::link::{CallsService, Node};
use crate::registry::Registrar;
use crate::secret::Guard;
use crate::tasks::Tasks;
use crate::wire::MAX_FRAME_BYTES;
use crate::wire::generated::calls::calls_server::CallsServer;
use crate::wire::generated::registry::registry_server::RegistryServer;
use arrow_flight::flight_service_server::FlightServiceServer;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};

/// A bound port, before anything is served on it.
pub(crate) struct Port {
    listener: TcpListener,
    /// host:port for others.
    pub address: String,
}

impl Port {
    /// A free port on this host name or address.
    pub async fn bind(host: &str) -> Result<Port, ControlError> {
        let listener = TcpListener::bind((host, 0)).await;
        let listener = listener.map_err(ControlError::io(format!("listen on host `{host}` (TANGELO_HOST)")))?;
        let port = listener.local_addr().map_err(ControlError::io("learn the port that was bound"))?.port();
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        Ok(Port { listener, address: format!("{host}:{port}") })
    }
}

/// What a process serves.
pub(crate) struct Services<N> {
    pub node: Option<Arc<N>>,
    pub shelf: Option<Shelf>,
    pub registrar: Option<Registrar>,
}

/// A server that runs.
pub(crate) struct Host {
    close: watch::Sender<bool>,
    closed: watch::Receiver<bool>,
}

impl Host {
    /// Takes no more connections, and waits until open calls have ended and what they said is sent.
    pub async fn close(&mut self, within: Duration) {
        self.close.send_replace(true);
        // Whoever still holds a connection then loses it.
        let _ = tokio::time::timeout(within, self.closed.wait_for(|closed| *closed)).await;
    }
}

/// Serves on a port.
pub(crate) fn serve<N: Node>(port: Port, services: Services<N>, guard: Guard, tasks: &Arc<Tasks>) -> Host {
    let ((close, mut closing), (closed_sender, closed)) = (watch::channel(false), watch::channel(false));
    let mut server = Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES)
        .max_frame_size(HTTP_FRAME_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .layer(InterceptorLayer::new(guard));
    let limit = MAX_FRAME_BYTES;
    let router: Router<_> = server
        .add_optional_service(services.node.map(|node| {
            let service = CallsServer::new(CallsService::new(node, tasks.clone()));
            service.max_decoding_message_size(limit).max_encoding_message_size(limit)
        }))
        .add_optional_service(
            services.shelf.map(|shelf| FlightServiceServer::new(shelf).max_encoding_message_size(1 << 30)),
        )
        .add_optional_service(services.registrar.map(RegistryServer::new));
    let incoming = TcpIncoming::from(port.listener).with_nodelay(Some(true));
    tasks.spawn("server", async move {
        let told = async move {
            // An error means that whoever could close is gone.
            let _ = closing.wait_for(|closing| *closing).await;
        };
        let served = router.serve_with_incoming_shutdown(incoming, told).await;
        closed_sender.send_replace(true);
        served.map_err(|e| crate::link::sources(&e))
    });
    Host { close, closed }
}
