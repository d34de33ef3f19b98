//! Rows of Arrow record batches as JSON values, whatever their nesting.

use arrow::array::{Array, AsArray, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type, UInt64Type};
use serde_json::{Map, Value};

/// The value of `array` at `row`. Types without a JSON form become text, as Arrow writes them.
///
/// # Errors
/// In words, a type that has no text form either.
pub(super) fn value_at(array: &dyn Array, row: usize) -> Result<Value, String> {
    if array.is_null(row) || *array.data_type() == DataType::Null {
        return Ok(Value::Null);
    }
    match array.data_type() {
        DataType::Boolean => Ok(array.as_boolean().value(row).into()),
        DataType::Utf8 => Ok(array.as_string::<i32>().value(row).into()),
        DataType::LargeUtf8 => Ok(array.as_string::<i64>().value(row).into()),
        DataType::UInt64 => Ok(array.as_primitive::<UInt64Type>().value(row).into()),
        DataType::Int64 => Ok(array.as_primitive::<Int64Type>().value(row).into()),
        DataType::Float64 => Ok(array.as_primitive::<Float64Type>().value(row).into()),
        kind if kind.is_integer() => through(array, row, &DataType::Int64),
        DataType::Float16 | DataType::Float32 => through(array, row, &DataType::Float64),
        DataType::Dictionary(_, values) => through(array, row, values),
        DataType::List(_) => list(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(row)),
        DataType::Struct(_) => object(array.as_struct(), row),
        DataType::Map(..) => entries(&array.as_map().value(row)),
        _ => through(array, row, &DataType::Utf8),
    }
}

fn through(array: &dyn Array, row: usize, kind: &DataType) -> Result<Value, String> {
    let one = cast(&array.slice(row, 1), kind).map_err(|e| e.to_string())?;
    value_at(&one, 0)
}

fn list(items: &dyn Array) -> Result<Value, String> {
    (0..items.len()).map(|index| value_at(items, index)).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn object(array: &StructArray, row: usize) -> Result<Value, String> {
    let fields = array.column_names().into_iter().zip(array.columns());
    let values = fields.map(|(name, column)| Ok((name.to_owned(), value_at(column, row)?)));
    values.collect::<Result<Map<_, _>, String>>().map(Value::Object)
}

/// A map with keys of text is an object; its entries are structs of key and value.
fn entries(items: &StructArray) -> Result<Value, String> {
    let mut object = Map::new();
    for row in 0..items.len() {
        let key = match value_at(items.column(0), row)? {
            Value::String(key) => key,
            other => other.to_string(),
        };
        object.insert(key, value_at(items.column(1), row)?);
    }
    Ok(Value::Object(object))
}
