-- Run once by the image, as its superuser. One role without special rights owns both databases: agnews holds the studies,
-- mlflow the runs.
\getenv password POSTGRES_PASSWORD
CREATE ROLE agnews LOGIN PASSWORD :'password';
CREATE DATABASE agnews OWNER agnews;
CREATE DATABASE mlflow OWNER agnews;
-- The image gave the superuser the same password. Without one, only a process in the container gets in as superuser.
ALTER ROLE postgres PASSWORD NULL;
