//! A row of a record batch as JSON, whatever its columns.
//!
//! Invariant: a field that is null is left out of its object. Columnar files cannot say that a field is absent, so that
//! writers fill in nulls, and a chat template asks whether a message *has* tool calls, not whether they are null.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type, UInt64Type};
use serde_json::{Map, Value};

/// Row `row` of a batch.
///
/// # Errors
/// A column of a type that JSON has no form for, by name.
pub(super) fn row_as_json(batch: &RecordBatch, row: usize) -> Result<Value, String> {
    object(&StructArray::from(batch.clone()), row)
}

fn object(fields: &StructArray, row: usize) -> Result<Value, String> {
    let mut found = Map::new();
    for (name, column) in fields.column_names().into_iter().zip(fields.columns()) {
        if !column.is_null(row) {
            found.insert(name.into(), value(column, row).map_err(|e| format!("column `{name}`: {e}"))?);
        }
    }
    Ok(Value::Object(found))
}

fn value(array: &ArrayRef, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    let one = |to: &DataType| cast(&array.slice(row, 1), to).map_err(|e| e.to_string());
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => {
            one(&DataType::Int64)?.as_primitive::<Int64Type>().value(0).into()
        }
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => {
            one(&DataType::UInt64)?.as_primitive::<UInt64Type>().value(0).into()
        }
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            one(&DataType::Float64)?.as_primitive::<Float64Type>().value(0).into()
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            one(&DataType::LargeUtf8)?.as_string::<i64>().value(0).into()
        }
        DataType::Dictionary(_, values) => value(&one(values)?, 0)?,
        DataType::Struct(_) => object(array.as_struct(), row)?,
        DataType::List(_) => items(&array.as_list::<i32>().value(row))?,
        DataType::LargeList(_) => items(&array.as_list::<i64>().value(row))?,
        DataType::FixedSizeList(..) => items(&array.as_fixed_size_list().value(row))?,
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let (keys, values) = (entries.column(0), entries.column(1));
            let entry = |at: usize| Ok((value(keys, at)?.as_str().unwrap_or_default().to_owned(), value(values, at)?));
            Value::Object((0..entries.len()).map(entry).collect::<Result<_, String>>()?)
        }
        other => one(&DataType::LargeUtf8)
            .map(|text| text.as_string::<i64>().value(0).into())
            .map_err(|_| format!("its type {other} has no form in JSON"))?,
    })
}

fn items(array: &ArrayRef) -> Result<Value, String> {
    (0..array.len()).map(|row| value(array, row)).collect::<Result<Vec<Value>, String>>().map(Value::Array)
}
