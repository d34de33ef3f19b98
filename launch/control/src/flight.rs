//! Batches from worker to worker, over Arrow Flight.
//!
//! A holder serves `DoGet`: the ticket names a shard, columns and rows, the answer is a stream of record batches of
//! some 2 MiB each (gRPC refuses messages over 4 MiB by default; one very long row may be larger, so the limit is
//! raised). A puller asks all holders of a batch at once and puts rows and columns together; what it holds itself it
//! takes without a copy through the network. Every other Flight method is refused: nothing can be put into a process.

use crate::error::{Cause, ControlError, RankFailure};
use crate::remote::{Piece, RemoteBatch, ShardId};
use crate::secret::{Bearer, Secret};
use crate::store::Store;
use crate::traffic::Traffic;
use arrow::array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::{concat_batches, interleave, take_record_batch};
use arrow::datatypes::Schema;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::flight_service_server::FlightService;
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    PollInfo, PutResult, SchemaResult, Ticket,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tangelo_core::Column;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// Shards pulled at once by one process.
const PULLS_AT_ONCE: usize = 8;
/// A holder that has no word for so long is asked whether it lives, and lost after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How much a holder may send ahead, bytes.
pub(crate) const WINDOW_BYTES: u32 = 8 << 20;
/// Of HTTP/2; its default of 16 KiB makes a batch many small writes.
pub(crate) const HTTP_FRAME_BYTES: u32 = 1 << 20;
/// A single row cannot be cut: the largest message that is accepted.
const MAX_ROW_BYTES: usize = 1 << 30;

/// What a puller wants of a shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Want {
    shard: ShardId,
    columns: Vec<Column>,
    rows: Vec<u32>,
}

/// Serves a store.
pub(crate) struct Shelf {
    pub store: Arc<Store>,
    pub traffic: Arc<Traffic>,
}

type Reply<T> = Result<Response<BoxStream<'static, Result<T, Status>>>, Status>;

fn only_do_get<T>() -> Result<T, Status> {
    Err(Status::unimplemented("this process serves batches by DoGet and nothing else"))
}

#[tonic::async_trait]
impl FlightService for Shelf {
    type HandshakeStream = BoxStream<'static, Result<HandshakeResponse, Status>>;
    type ListFlightsStream = BoxStream<'static, Result<FlightInfo, Status>>;
    type DoGetStream = BoxStream<'static, Result<FlightData, Status>>;
    type DoPutStream = BoxStream<'static, Result<PutResult, Status>>;
    type DoActionStream = BoxStream<'static, Result<arrow_flight::Result, Status>>;
    type ListActionsStream = BoxStream<'static, Result<ActionType, Status>>;
    type DoExchangeStream = BoxStream<'static, Result<FlightData, Status>>;

    async fn do_get(&self, request: Request<Ticket>) -> Reply<FlightData> {
        let want: Want = serde_json::from_slice(&request.get_ref().ticket)
            .map_err(|e| RankFailure::new(Cause::Protocol, format!("not a ticket: {e}")).status())?;
        let records = self.store.get(want.shard).and_then(|records| pick(&records, &want)).map_err(|f| f.status())?;
        let traffic = self.traffic.clone();
        let encoded = FlightDataEncoderBuilder::new().with_schema(records.schema()).build(stream::iter([Ok(records)]));
        let counted = encoded.map_err(Status::from).inspect_ok(move |data| traffic.data_sent(size(data)));
        Ok(Response::new(counted.boxed()))
    }

    async fn handshake(&self, _: Request<Streaming<HandshakeRequest>>) -> Reply<HandshakeResponse> {
        only_do_get()
    }
    async fn list_flights(&self, _: Request<Criteria>) -> Reply<FlightInfo> {
        only_do_get()
    }
    async fn get_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        only_do_get()
    }
    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        only_do_get()
    }
    async fn get_schema(&self, _: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        only_do_get()
    }
    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Reply<PutResult> {
        only_do_get()
    }
    async fn do_action(&self, _: Request<Action>) -> Reply<arrow_flight::Result> {
        only_do_get()
    }
    async fn list_actions(&self, _: Request<Empty>) -> Reply<ActionType> {
        only_do_get()
    }
    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Reply<FlightData> {
        only_do_get()
    }
}

fn size(data: &FlightData) -> usize {
    data.data_header.len() + data.data_body.len()
}

/// The wanted columns and rows of a shard; without a copy where the rows follow one another.
fn pick(records: &RecordBatch, want: &Want) -> Result<RecordBatch, RankFailure> {
    let wrong = |what: String| RankFailure::new(Cause::Protocol, format!("{} has no {what}", want.shard));
    let schema = records.schema();
    let column = |c: &Column| schema.index_of(c.name()).map_err(|_| wrong(format!("column `{c}`")));
    let columns = want.columns.iter().map(column).collect::<Result<Vec<_>, _>>()?;
    let records = records.project(&columns).map_err(|e| wrong(e.to_string()))?;
    if let Some(row) = want.rows.iter().find(|&&row| row as usize >= records.num_rows()) {
        return Err(wrong(format!("row {row}: it has {}", records.num_rows())));
    }
    let first = want.rows.first().copied().unwrap_or(0);
    if want.rows.iter().zip(first..).all(|(&row, expected)| row == expected) {
        return Ok(records.slice(first as usize, want.rows.len()));
    }
    take_record_batch(&records, &UInt32Array::from(want.rows.clone())).map_err(|e| wrong(e.to_string()))
}

type Client = FlightServiceClient<InterceptedService<Channel, Bearer>>;

/// Gets the rows of remote batches.
pub(crate) struct Puller {
    store: Arc<Store>,
    /// host:port of this process: what lies there is taken from the store.
    own_address: String,
    traffic: Arc<Traffic>,
    bearer: Bearer,
    clients: Mutex<HashMap<String, Client>>,
}

impl Puller {
    pub fn new(
        store: Arc<Store>,
        own_address: String,
        traffic: Arc<Traffic>,
        secret: &Secret,
    ) -> Result<Puller, ControlError> {
        Ok(Puller { store, own_address, traffic, bearer: Bearer::new(secret)?, clients: Mutex::default() })
    }

    /// The rows of a batch, all columns, in the batch's order.
    pub async fn pull(&self, batch: &RemoteBatch) -> Result<RecordBatch, RankFailure> {
        let mut columns: Vec<(Column, ArrayRef)> = Vec::new();
        for piece in batch.pieces() {
            columns.extend(self.pull_piece(piece).await?);
        }
        let fields: Vec<_> = columns
            .iter()
            .map(|(c, array)| arrow::datatypes::Field::new(c.name(), array.data_type().clone(), false))
            .collect();
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), arrays, &rows)
            .map_err(|e| RankFailure::new(Cause::Protocol, format!("columns do not make a batch: {e}")))
    }

    async fn pull_piece(&self, piece: &Piece) -> Result<Vec<(Column, ArrayRef)>, RankFailure> {
        let mut rows: Vec<Vec<u32>> = vec![Vec::new(); piece.shards.len()];
        // Where row i of the batch is: (shard, place among the rows pulled from it).
        let mut places = Vec::with_capacity(piece.row_of.len());
        for (&shard, &row) in piece.shard_of.iter().zip(&piece.row_of) {
            places.push((shard as usize, rows[shard as usize].len()));
            rows[shard as usize].push(row);
        }
        // Boxed, because the compiler does not see through streams of borrowing futures.
        let mut pulls: Vec<BoxFuture<'_, _>> = Vec::with_capacity(rows.len());
        for (shard, rows) in piece.shards.iter().zip(rows) {
            let want = Want { shard: shard.id, columns: piece.columns.clone(), rows };
            pulls.push(self.pull_shard(&shard.address, want).boxed());
        }
        // In order, so that shard i is at i.
        let parts: Vec<RecordBatch> = stream::iter(pulls).buffered(PULLS_AT_ONCE).try_collect().await?;
        let column = |(at, &column): (usize, &Column)| Ok((column, in_order(&parts, at, &places)?));
        piece.columns.iter().enumerate().map(column).collect()
    }

    async fn pull_shard(&self, address: &str, want: Want) -> Result<RecordBatch, RankFailure> {
        if address == self.own_address {
            return self.store.get(want.shard).and_then(|records| pick(&records, &want));
        }
        let mut client = self.client(address)?;
        let ticket = Ticket { ticket: serde_json::to_vec(&want).unwrap_or_default().into() };
        let failed = |status: Status| {
            let failure = RankFailure::from(status);
            RankFailure { message: format!("pulling from {address}: {}", failure.message), ..failure }
        };
        let data = client.do_get(ticket).await.map_err(failed)?.into_inner();
        let traffic = self.traffic.clone();
        let counted = data.inspect_ok(move |data| traffic.data_received(size(data)));
        let mut batches = FlightRecordBatchStream::new_from_flight_data(counted.map_err(FlightError::from));
        let mut parts = VecDeque::new();
        while let Some(part) = batches.next().await {
            parts.push_back(part.map_err(|error| match error {
                FlightError::Tonic(status) => failed(*status),
                other => RankFailure::new(Cause::Protocol, format!("pulling from {address}: {other}")),
            })?);
        }
        let schema = batches.schema().cloned().unwrap_or_else(|| Arc::new(Schema::empty()));
        concat_batches(&schema, parts.iter()).map_err(|e| RankFailure::new(Cause::Protocol, e.to_string()))
    }

    /// A connection is made at the first use and kept.
    fn client(&self, address: &str) -> Result<Client, RankFailure> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(address) {
            return Ok(client.clone());
        }
        let channel = endpoint(address)?.connect_lazy();
        let client = FlightServiceClient::with_interceptor(channel, self.bearer.clone());
        let client = client.max_decoding_message_size(MAX_ROW_BYTES).max_encoding_message_size(MAX_ROW_BYTES);
        clients.insert(address.to_owned(), client.clone());
        Ok(client)
    }
}

/// Column `at` of the pulled parts, its rows in the batch's order.
fn in_order(parts: &[RecordBatch], at: usize, places: &[(usize, usize)]) -> Result<ArrayRef, RankFailure> {
    if let [only] = parts {
        return Ok(only.column(at).clone());
    }
    let arrays: Vec<&dyn Array> = parts.iter().map(|part| part.column(at).as_ref()).collect();
    interleave(&arrays, places).map_err(|e| RankFailure::new(Cause::Protocol, e.to_string()))
}

/// How processes of a job connect to one another.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, RankFailure> {
    let endpoint = Endpoint::try_from(format!("http://{address}"))
        .map_err(|e| RankFailure::new(Cause::Protocol, format!("`{address}` is no host:port: {e}")))?;
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_secs(10))
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES)
        .max_frame_size(HTTP_FRAME_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::{Row, Shard};
    use tangelo_core::batch::{Batch, per_sequence_i64, ragged_f32, ragged_u32};

    fn held(rows: std::ops::Range<u32>) -> RecordBatch {
        let tokens: Vec<Vec<u32>> = rows.clone().map(|row| vec![row; row as usize % 3 + 1]).collect();
        let values: Vec<Vec<f32>> = tokens.iter().map(|row| row.iter().map(|&t| t as f32 / 2.0).collect()).collect();
        Batch::from_columns(vec![
            (Column::Tokens, ragged_u32(&tokens)),
            (Column::Value, ragged_f32(&values)),
            (Column::GroupId, per_sequence_i64(rows.map(i64::from).collect())),
        ])
        .unwrap()
        .records()
        .clone()
    }

    /// Rows 0..4 and 4..10 lie in two shards of one store; what is pulled equals the same rows taken from the whole.
    #[tokio::test]
    async fn rows_of_several_shards_come_in_the_batchs_order() {
        let store = Arc::new(Store::new(0, usize::MAX));
        let handle = |range: std::ops::Range<u32>| {
            let id = store.put(held(range.clone()), 1, "t").unwrap();
            let rows = range.map(|row| Row { tokens: row % 3 + 1, group: i64::from(row) }).collect();
            let columns = vec![Column::Tokens, Column::Value, Column::GroupId];
            RemoteBatch::of_shard(Shard { id, address: "me".into() }, columns, rows)
        };
        let whole = RemoteBatch::concat(&[handle(0..4), handle(4..10)]).unwrap();
        let puller = Puller::new(store, "me".into(), Arc::default(), &Secret::generate().unwrap()).unwrap();
        let order = [9usize, 0, 5, 4, 3, 3, 1];
        let pulled = puller.pull(&whole.select(&order).unwrap()).await.unwrap();
        let indices = UInt32Array::from(order.map(|row| row as u32).to_vec());
        assert_eq!(Batch::new(pulled).unwrap().records(), &take_record_batch(&held(0..10), &indices).unwrap());
    }

    #[test]
    fn a_ticket_for_what_is_not_there_is_refused() {
        let check = |columns: &[Column], rows: &[u32], expected: expect_test::Expect| {
            let shard = ShardId { holder: 2, serial: 5 };
            let want = Want { shard, columns: columns.to_vec(), rows: rows.to_vec() };
            expected.assert_eq(&pick(&held(0..4), &want).unwrap_err().message);
        };
        check(&[Column::Reward], &[0], expect_test::expect!["batch 5 of rank 2 has no column `reward`"]);
        check(&[Column::Value], &[0, 4], expect_test::expect!["batch 5 of rank 2 has no row 4: it has 4"]);
    }
}
