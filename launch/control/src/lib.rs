//! How processes of a job find and call each other.
