// fake OpenAI worker: ./fakew port ttft_us itl_us [cap]   cap: most tokens of an answer (1 for a prefill worker); one write() per token; itl 0 = as fast as possible, one chunk per stream per loop
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#define MAXC 8192
#define RB 2097152
typedef struct {int fd;char*rb;int rl;int active;int left;int hdr;double due;int streaming;int qi;char*ob;int ol,oo;}C;
static C*cs[65536];static int act[65536],nact;static int ep;static double ttft,itl;static int cap;static long reqs,chunks;
static double now(){struct timespec t;clock_gettime(CLOCK_MONOTONIC,&t);return t.tv_sec+t.tv_nsec*1e-9;}
static void closec(C*c){if(c->active){int l=act[--nact];act[c->qi]=l;cs[l]->qi=c->qi;}cs[c->fd]=0;close(c->fd);free(c->rb);free(c->ob);free(c);}
static int wr(C*c,const char*b,int n){ // returns -1 if closed
 if(c->ol==c->oo){int w=send(c->fd,b,n,MSG_NOSIGNAL);if(w==n)return 0;if(w<0){if(errno!=EAGAIN)return -1;w=0;}b+=w;n-=w;}
 if(c->oo){memmove(c->ob,c->ob+c->oo,c->ol-c->oo);c->ol-=c->oo;c->oo=0;}
 c->ob=realloc(c->ob,c->ol+n);memcpy(c->ob+c->ol,b,n);c->ol+=n;
 struct epoll_event e={.events=EPOLLIN|EPOLLOUT,.data.fd=c->fd};epoll_ctl(ep,EPOLL_CTL_MOD,c->fd,&e);return 0;}
static const char*CH="data: {\"id\":\"cmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"smol\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
static const char*LAST="data: {\"id\":\"cmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"smol\",\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"length\"}]}\n\n";
static char chb[1024],endb[2048];static int chl,endl;
static int step(C*c){ if(!c->hdr){const char*h="HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";char b[2048];int n=sprintf(b,"%s",h);memcpy(b+n,chb,chl);n+=chl;c->hdr=1;c->left--;chunks++;return wr(c,b,n);}
 if(c->left>0){c->left--;chunks++;return wr(c,chb,chl);}
 int l=act[--nact];act[c->qi]=l;cs[l]->qi=c->qi;c->active=0;return wr(c,endb,endl);}
static int handle(C*c){ for(;;){ if(c->active)return 0; char*e=memmem(c->rb,c->rl,"\r\n\r\n",4);if(!e)return 0;int hl=e-c->rb+4;int cl=0;
  char*p=strcasestr(c->rb,"content-length:");if(p&&p<e)cl=atoi(p+15); if(strcasestr(c->rb,"transfer-encoding: chunked")&&strcasestr(c->rb,"transfer-encoding: chunked")<e){char*z=memmem(e,c->rl-(e-c->rb),"\r\n0\r\n\r\n",7);if(!z)return 0;cl=z+7-(c->rb+hl);}
  if(c->rl<hl+cl)return 0; reqs++;
  char sv=c->rb[hl+cl];c->rb[hl+cl]=0;char*body=c->rb+hl; int isget=!strncmp(c->rb,"GET",3);
  int mt=16,st=0; char*q;
  if(!isget){ if((q=strstr(body,"\"max_tokens\""))||(q=strstr(body,"\"max_completion_tokens\""))||(q=strstr(body,"\"max_new_tokens\""))){q=strchr(q,':');mt=atoi(q+1+(q[1]==' '));if(mt<1)mt=1;if(cap&&mt>cap)mt=cap;} if((q=strstr(body,"\"stream\""))){q=strchr(q,':')+1;while(*q==' ')q++;st=*q=='t';}}
  c->rb[hl+cl]=sv;int tot=hl+cl;
  char mx[16];memcpy(mx,c->rb,15);mx[15]=0;
  memmove(c->rb,c->rb+tot,c->rl-tot);c->rl-=tot;c->rb[c->rl]=0;
  if(isget||!st){const char*b=isget?(strncmp(mx,"GET /v1/models",14)?"{\"status\":\"ok\",\"model_path\":\"smol\",\"served_model_name\":\"smol\",\"tp_size\":1,\"dp_size\":1}":"{\"object\":\"list\",\"data\":[{\"id\":\"smol\",\"object\":\"model\",\"created\":1,\"owned_by\":\"x\",\"root\":\"smol\"}]}"):"{\"id\":\"cmpl-1\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"smol\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\" token token\"},\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,\"total_tokens\":7}}";
   char o[1024];int n=sprintf(o,"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",strlen(b),b);if(wr(c,o,n)<0)return -1;continue;}
  c->active=1;c->left=mt;c->hdr=0;c->due=now()+ttft;c->qi=nact;act[nact++]=c->fd; } }
static int qa;int main(int ac,char**av){qa=getenv("QA")!=0;int port=atoi(av[1]);ttft=atof(av[2])*1e-6;itl=atof(av[3])*1e-6;if(ac>4)cap=atoi(av[4]);
 chl=sprintf(chb,"%zx\r\n%s\r\n",strlen(CH),CH);endl=sprintf(endb,"%zx\r\n%s\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",strlen(LAST),LAST);
 int s=socket(AF_INET,SOCK_STREAM|SOCK_NONBLOCK,0),one=1;setsockopt(s,SOL_SOCKET,SO_REUSEADDR,&one,4);struct sockaddr_in a={.sin_family=AF_INET,.sin_port=htons(port),.sin_addr.s_addr=htonl(INADDR_LOOPBACK)};if(bind(s,(void*)&a,sizeof a)){perror("bind");return 1;}listen(s,4096);
 ep=epoll_create1(0);struct epoll_event e={.events=EPOLLIN,.data.fd=s};epoll_ctl(ep,EPOLL_CTL_ADD,s,&e);static struct epoll_event ev[1024];
 for(;;){int to=nact?(itl>0||ttft>0?1:0):200;int n=epoll_wait(ep,ev,1024,to);
  for(int i=0;i<n;i++){int fd=ev[i].data.fd;if(fd==s){for(;;){int f=accept4(s,0,0,SOCK_NONBLOCK);if(f<0)break;setsockopt(f,IPPROTO_TCP,TCP_NODELAY,&one,4);C*c=calloc(1,sizeof*c);c->fd=f;c->rb=malloc(RB+1);cs[f]=c;struct epoll_event x={.events=EPOLLIN,.data.fd=f};epoll_ctl(ep,EPOLL_CTL_ADD,f,&x);}continue;}
   C*c=cs[fd];if(!c)continue;
   if(ev[i].events&EPOLLOUT){int w=send(fd,c->ob+c->oo,c->ol-c->oo,MSG_NOSIGNAL);if(w>0)c->oo+=w;if(c->oo==c->ol){c->oo=c->ol=0;struct epoll_event x={.events=EPOLLIN,.data.fd=fd};epoll_ctl(ep,EPOLL_CTL_MOD,fd,&x);}}
   if(ev[i].events&(EPOLLIN|EPOLLHUP|EPOLLERR)){int r=recv(fd,c->rb+c->rl,RB-c->rl,0);if(r<=0){if(r<0&&errno==EAGAIN)continue;closec(c);continue;}c->rl+=r;c->rb[c->rl]=0;if(qa)setsockopt(fd,IPPROTO_TCP,TCP_QUICKACK,&one,4);if(handle(c)<0){closec(c);continue;}}}
  double t=now();for(int i=nact-1;i>=0;i--){C*c=cs[act[i]];if(c->due<=t){c->due+=c->hdr?itl:itl;if(itl==0)c->due=t;if(step(c)<0)closec(c);else if(!c->active&&c->rl){if(handle(c)<0)closec(c);}}}
 }}
