//! Columns that were fetched, by name.

use crate::error::{DriverError, Result};
use arrow::array::{ArrayRef, AsArray, Int64Array, LargeListArray, RecordBatch};
use tangelo_core::Column;

/// A column with a list in each row.
pub(crate) fn list(records: &RecordBatch, column: Column) -> Result<LargeListArray> {
    let found = array(records, column)?;
    found.as_list_opt::<i64>().cloned().ok_or_else(|| wrong(column, "is no column of lists"))
}

/// A column with an integer in each row.
pub(crate) fn int64(records: &RecordBatch, column: Column) -> Result<Int64Array> {
    let found = array(records, column)?;
    found.as_primitive_opt().cloned().ok_or_else(|| wrong(column, "is no column of integers"))
}

fn array(records: &RecordBatch, column: Column) -> Result<&ArrayRef> {
    records.column_by_name(column.name()).ok_or_else(|| wrong(column, "is not there"))
}

fn wrong(column: Column, how: &str) -> DriverError {
    DriverError::Internal(format!("of what the ranks made, `{column}` {how}"))
}
